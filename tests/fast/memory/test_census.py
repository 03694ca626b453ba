"""The census finds slots with two owners, and slots that reach a request of the other kind."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.memory.census import DENSE, LATE, PRUNED, Owned, Read, SlotCensus

SIZE = 40


def slots(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


@given(owners=st.lists(st.sets(st.integers(1, SIZE)), max_size=5))
def test_a_slot_with_two_owners_is_found(owners: list[set[int]]) -> None:
    owned = [Owned(f"owner {i}", slots(*sorted(held))) for i, held in enumerate(owners)]
    twice = {s for i, held in enumerate(owners) for other in owners[:i] for s in held & other}
    problems = SlotCensus(SIZE, "cpu").shared(owned)
    assert len(problems) == bool(twice)
    if twice:
        assert problems[0].startswith(f"{len(twice)} slots ({', '.join(map(str, sorted(twice)[:5]))}")
        named = [f"owner {i}" for i, held in enumerate(owners) if held & twice]
        assert problems[0].endswith(", ".join(named))


def test_a_row_that_lists_a_slot_twice_is_found() -> None:
    assert SlotCensus(SIZE, "cpu").shared([Owned("row 3", slots(4, 5, 4))]) == [
        "1 slots (4) have more than one owner: row 3"
    ]


def test_what_the_other_kind_wrote_is_found() -> None:
    census = SlotCensus(SIZE, "cpu")
    census.wrote(slots(1, 2, 3), DENSE)
    census.wrote(slots(4, 5), PRUNED)
    census.wrote(slots(6), LATE)
    good = [Read("a", slots(1, 3), DENSE), Read("b", slots(5, 4), PRUNED)]
    assert census.strangers(good) == []
    assert census.strangers([*good, Read("c", slots(3, 4, 6, 7), DENSE)]) == [
        "c reads dense KV from 3 slots (4, 6, 7), which hold boundary states, late KV, unwritten"
    ]
    census.wrote(slots(4, 6, 7), DENSE)
    assert census.strangers([Read("c", slots(3, 4, 6, 7), DENSE)]) == []
    assert census.strangers([Read("b", slots(5, 4), PRUNED)]) == [
        "b reads boundary states from 1 slots (4), which hold dense KV"
    ]
