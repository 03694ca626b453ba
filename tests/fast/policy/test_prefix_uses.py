"""How often the beginning of a prompt was used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.policy.prefix_uses import BLOCK, PrefixUses

prompts = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=8)


@given(prompts)
def test_counts_are_those_of_prompts_with_the_same_blocks(shapes: list[tuple[int, int]]) -> None:
    uses, seen = PrefixUses(), []
    for step, (first, blocks) in enumerate(shapes):
        prompt = [first] * BLOCK * blocks + [9] * 7
        for shared in (0, BLOCK * blocks):
            ends = range(BLOCK, shared + 1, BLOCK)
            before = [sum(p[:end] == prompt[:end] for p in seen) for end in ends]
            found = uses.note(prompt, "", shared, 2 * step + (shared > 0)).before
            assert found == (sum(before) / len(before) if before else 0)
            seen.append(prompt)


def test_blocks_are_known_by_all_that_is_before_them() -> None:
    uses = PrefixUses()
    uses.note([1] * BLOCK + [2] * BLOCK, "", 0, 1)
    assert uses.note([3] * BLOCK + [2] * BLOCK, "", 2 * BLOCK, 2).before == 0


def test_a_client_s_key_is_its_own() -> None:
    uses, prompt = PrefixUses(), [1] * BLOCK
    uses.note(prompt, "a", 0, 1)
    assert (uses.note(prompt, "b", BLOCK, 2).before, uses.note(prompt, "a", BLOCK, 3).before) == (0, 1)


def test_the_least_recently_used_are_forgotten_first() -> None:
    uses = PrefixUses(capacity=2)
    for step, first in enumerate((1, 2, 1, 3)):
        uses.note([first] * BLOCK, "", 0, step)
    assert uses.note([1] * BLOCK, "", BLOCK, 4).before == 2
    assert uses.note([2] * BLOCK, "", BLOCK, 5).before == 0


def test_what_arrives_at_once_is_one_use() -> None:
    uses, prompt = PrefixUses(), [1] * BLOCK
    assert [uses.note(prompt, "", BLOCK, step).before for step in (1, 1, 1, 2, 2, 3)] == [0, 0, 0, 1, 1, 2]


TEXT = [1] * (2 * BLOCK + 50)
TURN = [*TEXT, 7, 7, 7]  # a prompt
NEXT = [*TURN, 5, 5, 8, 8]  # and one after its answer, 5, 5


@pytest.mark.parametrize(
    ("prompt", "shared", "continued"),
    [
        (NEXT, len(TURN) + 2, True),
        (NEXT, len(TURN), True),  # without its answer
        (NEXT, len(TURN) - 1, False),  # the end of it is not cached
        (TURN, len(TURN) - 8, False),  # the same again
        ([*TEXT, 9, 9, 9, 9, 9], len(TEXT), False),  # another question
        ([*TEXT, 9, 9, 9, 9, 9], len(TEXT) + 4, False),
        (TEXT[: BLOCK + 3], BLOCK, False),  # a shorter one
        ([*TURN[:-1], 6, 5, 5], len(TURN), False),
    ],
)
def test_a_prompt_that_goes_on_where_another_ended(prompt: list[int], shared: int, continued: bool) -> None:
    uses = PrefixUses()
    assert not uses.note(TURN, "", 0, 1).continued
    assert uses.note(prompt, "", shared, 2).continued == continued


def test_a_prompt_sent_to_be_cached_is_no_turn() -> None:
    uses = PrefixUses()
    uses.note(TURN, "", 0, 1, answered=False)
    assert not uses.note(NEXT, "", len(TURN), 2).continued


def test_turns_in_blocks_that_begin_alike_are_told_apart() -> None:
    """Of prompts that end in the same block the last one is remembered."""
    uses, other = PrefixUses(), [*TEXT, 9]
    uses.note(TURN, "", 0, 1)
    uses.note(other, "", len(TEXT), 2)
    assert uses.note([*other, 5, 8], "", len(other) + 1, 3).continued
    assert not uses.note(NEXT, "", len(TURN) + 2, 4).continued
