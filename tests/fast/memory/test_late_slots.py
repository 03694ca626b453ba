"""Late slots at single moments: what a row takes, keeps and gives back."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

from claa_sglang.memory.late_slots import LateSlots, OutOfLateSlots
from tests.fast.memory.slots import extend, listed, make_pool, make_state, owned_twice


@pytest.mark.parametrize("counts", [(6,), (6, 3)], ids=["one-step", "two-steps"])
def test_a_started_prompt_can_be_finished(counts: tuple[int, ...]) -> None:
    # The first chunk takes all the late slots the prompt can need, however short the chunk is.
    _, allocator, slots = make_pool(len(counts), size=20)
    slots.bind(1, make_state(12, counts), generated=0)
    assert not slots.reserved(1) and not slots.reserved(2) and not slots.reserved(None)
    extend(slots, {1: 3})
    assert slots.held == 6 and slots.reserved(1) and allocator.available_size() == 14
    extend(slots, {1: 9})
    extend(slots, {1: 12})
    assert slots.held == 6
    extend(slots, {1: 13})
    assert slots.held == 7


def test_generated_tokens_of_a_retracted_request_are_reserved_with_its_prompt() -> None:
    _, _, slots = make_pool(2, size=30)
    slots.bind(1, make_state(12, (6, 3)), generated=4)
    extend(slots, {1: 3})
    assert slots.held == 10
    assert listed(slots, 1, 2, 7)[3:] == listed(slots, 1, 1, 10)[6:]
    extend(slots, {1: 16})
    assert slots.held == 10
    extend(slots, {1: 17})
    assert slots.held == 11
    assert listed(slots, 1, 2, 8)[3:] == listed(slots, 1, 1, 11)[6:]


def test_several_tokens_at_once_reach_every_steps_row() -> None:
    _, _, slots = make_pool(2, size=40)
    slots.bind(1, make_state(12, (6, 3)), generated=0)
    slots.bind(3, make_state(10, (5, 2)), generated=0)
    extend(slots, {1: 12, 3: 10})
    extend(slots, {1: 15, 3: 11})  # not one each
    extend(slots, {1: 16, 3: 12})  # one each
    extend(slots, {1: 18, 3: 15})  # not one each, behind generated tokens
    assert listed(slots, 1, 2, 9)[3:] == listed(slots, 1, 1, 12)[6:]
    assert listed(slots, 3, 2, 7)[2:] == listed(slots, 3, 1, 10)[5:]


def test_running_out_takes_nothing() -> None:
    asked: list[int] = []
    _, allocator, slots = make_pool(1, size=10)
    slots.evict = asked.append
    slots.bind(1, make_state(12, (6,)), generated=0)
    slots.bind(2, make_state(12, (6,)), generated=0)
    before = slots.table.clone()
    with pytest.raises(OutOfLateSlots, match="need 12 KV slots, 10 are free"):
        extend(slots, {1: 12, 2: 12})
    assert asked == [12]  # eviction was tried first
    assert slots.held == 0 and allocator.available_size() == 10 and torch.equal(slots.table, before)
    extend(slots, {1: 12})
    assert slots.held == 6


def test_dense_rows_are_left_alone() -> None:
    _, allocator, slots = make_pool(1, size=10)
    extend(slots, {1: 40, 2: 40})
    slots.free(1)
    assert slots.held == 0 and allocator.available_size() == 10 and bool((slots.table == -1).all())


def test_a_row_that_was_not_freed_cannot_be_taken() -> None:
    _, _, slots = make_pool(1, size=10)
    state = make_state(4, (2,))
    slots.bind(1, state, generated=0)
    slots.bind(1, state, generated=0)
    with pytest.raises(ValueError, match="row 1 is still bound"):
        slots.bind(1, make_state(4, (2,)), generated=0)  # equal, but another request's
    slots.free(1)
    slots.bind(1, make_state(4, (2,)), generated=0)


def test_freed_slots_stay_freed_when_the_row_is_written_again() -> None:
    # Frees may be held back in a group while the row is reused.
    _, allocator, slots = make_pool(1, size=4)
    slots.bind(1, make_state(4, (2,)), generated=0)
    extend(slots, {1: 4})
    allocator.free_group_begin()
    slots.free(1)
    slots.bind(1, make_state(4, (2,)), generated=0)
    extend(slots, {1: 4})
    allocator.free_group_end()
    assert allocator.available_size() == 2 and owned_twice(allocator, slots) == []


def test_holdings_are_the_slots_of_each_row() -> None:
    _, _, slots = make_pool(1, size=20)
    for row in (1, 2, 3):
        slots.bind(row, make_state(8, (4,)), generated=0)
    extend(slots, {1: 8, 2: 9})
    held = {row: slots_of_row.tolist() for row, slots_of_row in slots.holdings()}
    assert held == {1: listed(slots, 1, 1, 4), 2: listed(slots, 2, 1, 5)}


def test_a_slot_set_aside_is_owned_until_the_next_or_the_end() -> None:
    _, allocator, slots = make_pool(1, size=20)
    state = make_state(8, (4,))
    slots.bind(1, state, generated=0)
    extend(slots, {1: 8})
    for free in (15, 15):  # the second takes the place of the first
        slot = allocator.alloc(1)
        slots.set_aside(1, slot)
        assert state.progress.last_slots is slot and slots.held == 5 and allocator.available_size() == free
        assert slot.item() in dict(slots.holdings())[1].tolist() and owned_twice(allocator, slots) == []
    slots.free(1)
    assert slots.held == 0 and allocator.available_size() == 20 and state.progress.last_slots is None


def test_a_freed_row_starts_its_late_prefill_again() -> None:
    # A request that is retracted between the parts of its late prefill has lost their KV.
    _, _, slots = make_pool(1, size=20)
    state = make_state(8, (4,))
    slots.bind(1, state, generated=0)
    state.progress.late_spans[0] = (1, 3)
    slots.free(1)
    assert set(state.progress.late_spans) == {(0, 0)}


@pytest.mark.parametrize("counts", [(5,), (5, 5)], ids=["one-step", "two-steps"])
def test_borrowed_slots_are_listed_at_every_level_and_stay_their_lender_s(counts: tuple[int, ...]) -> None:
    _, allocator, slots = make_pool(len(counts), size=20)
    lent = allocator.alloc(5)
    state = make_state(5, counts)
    state.progress.borrowed = lent
    slots.bind(1, state, generated=0)
    slots.bind(2, make_state(8, (4, 2)[: len(counts)]), generated=0)
    extend(slots, {1: 5, 2: 8})
    assert [listed(slots, 1, level, 5) for level in range(1, len(counts) + 1)] == [lent.tolist()] * len(counts)
    assert slots.held == 4 and not slots.reserved(1) and [row for row, _ in slots.holdings()] == [2]
    slots.free(1)
    slots.free(2)
    assert slots.held == 0 and allocator.available_size() == 15  # the lender has them still


def test_a_table_that_is_no_multiple_of_stocks_is_refused() -> None:
    with pytest.raises(ValueError, match="7 rows, not a multiple"):
        LateSlots(
            torch.zeros(7, 4, dtype=torch.int32), 5, TokenToKVPoolAllocator(4, torch.int64, "cpu", None, False), id
        )
