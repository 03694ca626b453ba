"""Where chunks end and what a pruned request costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.memory.admission import MARGIN, LateRows, chunk_len, late_prefill_len, max_new_tokens
from claa_sglang.memory.pages import Pages
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState

LENGTHS = st.integers(1, 300)
WINDOWS = st.integers(1, 40)


WINDOW = 8


def make_state(prompt: int, *keep_rates: float) -> RequestState:
    rates = keep_rates or (0.5,)
    steps = tuple(PruneStep(prune_layer=i, keep_rate=rate, score_layers=(i,)) for i, rate in enumerate(rates))
    config = ClaaConfig(steps=steps, num_layers=len(steps) + 1, window=WINDOW)
    return RequestState.pruned_request(RequestOptions(), config, prompt)


@given(budget=LENGTHS, remaining=LENGTHS, window=WINDOWS)
def test_a_chunk_fits_and_leaves_the_window_for_the_last(budget: int, remaining: int, window: int) -> None:
    length = chunk_len(budget, remaining, window)
    assert 0 <= length <= min(budget, remaining)
    left = remaining - length
    assert left == 0 or length == 0 or left >= window


@given(budget=LENGTHS, remaining=LENGTHS, window=WINDOWS)
def test_a_budget_of_the_window_or_the_rest_makes_progress(budget: int, remaining: int, window: int) -> None:
    if budget >= min(window, remaining):
        assert chunk_len(budget, remaining, window) > 0


@given(budget=LENGTHS, remaining=LENGTHS, window=WINDOWS)
def test_no_longer_chunk_would_do(budget: int, remaining: int, window: int) -> None:
    length = chunk_len(budget, remaining, window)
    longer = range(length + 1, min(budget, remaining) + 1)
    assert not any(remaining - n == 0 or remaining - n >= window for n in longer)


@given(prompt=LENGTHS, window=WINDOWS, budgets=st.lists(LENGTHS, min_size=1, max_size=8))
def test_a_prompt_in_chunks_ends_with_the_window(prompt: int, window: int, budgets: list[int]) -> None:
    remaining, chunks = prompt, []
    for step in range(2000):
        chunks.append(chunk_len(budgets[step % len(budgets)], remaining, window))
        remaining -= chunks[-1]
        if remaining == 0:
            break
    if max(budgets) >= window:
        assert remaining == 0
    if remaining == 0:
        assert chunks[-1] >= min(window, prompt)


@given(remaining=LENGTHS, window=WINDOWS, size=st.sampled_from([2, 16, 64]), more=st.integers(0, 5))
def test_chunks_of_a_paged_prompt_end_with_pages_and_the_last_has_the_window(
    remaining: int, window: int, size: int, more: int
) -> None:
    # The least that `chunk-below-window` lets through, in whole pages as SGLang asks.
    pages = Pages(size)
    budget = pages.round_up(window + size - 1) + more * size
    while remaining:
        length = chunk_len(budget, remaining, window, pages)
        assert 0 < length <= budget and (length == remaining or length % size == 0)
        assert length == remaining or remaining - length >= window
        remaining -= length


@pytest.mark.parametrize(
    ("budget", "remaining", "expected"),
    [(64, 64, 64), (65, 64, 64), (63, 64, 56), (10, 64, 10), (7, 8, 0), (3, 9, 1), (56, 64, 56), (57, 64, 56)],
)
def test_chunks_by_hand(budget: int, remaining: int, expected: int) -> None:
    assert chunk_len(budget, remaining, window=8) == expected


def test_prefill_takes_the_kept_tokens_and_what_was_generated() -> None:
    assert late_prefill_len(make_state(100), generated=0) == 50
    assert late_prefill_len(make_state(100), generated=7) == 57


@given(prompt=LENGTHS, rate=st.floats(0.01, 1.0), capacity=st.integers(0, 1000))
def test_what_may_be_generated_fits_the_pool(prompt: int, rate: float, capacity: int) -> None:
    state = make_state(prompt, rate)
    tokens = max_new_tokens(capacity, state, Pages(1))
    used = prompt + late_prefill_len(state, generated=0) + MARGIN + 1
    assert used + 2 * tokens <= capacity < used + 2 * (tokens + 1)


@pytest.mark.parametrize("rates", [(0.5,), (0.5, 0.2)], ids=str)
@given(prompt=LENGTHS, capacity=st.integers(0, 1000), size=st.sampled_from([2, 16, 64]))
def test_what_may_be_generated_fits_the_pages_of_the_pool(
    rates: tuple[float, ...], prompt: int, capacity: int, size: int
) -> None:
    state, pages = make_state(prompt, *rates), Pages(size)
    if (tokens := max_new_tokens(capacity, state, pages)) >= 0:
        used = pages.round_up(prompt + tokens) + sum(pages.late_slots(state, tokens))
        # All but a page for each row is used.
        assert used + MARGIN + size <= capacity < used + MARGIN + size + (1 + len(rates)) * 2 * size


@pytest.mark.parametrize("steps", [1, 2])
@given(limit=st.integers(1, 50), rows=st.lists(st.integers(0, 60), max_size=6))
def test_a_step_takes_no_more_late_rows_than_a_chunk(steps: int, limit: int, rows: list[int]) -> None:
    late = LateRows(limit, steps, WINDOW)
    taken = [late.take(n) for n in rows]
    assert sum(taken) == min(limit, sum(rows)) and late.left == [limit - sum(taken)] * steps
    assert late.cap(1000) == limit - sum(taken)


def test_without_chunks_nothing_is_bounded() -> None:
    late, state = LateRows(None, 2, WINDOW), make_state(1000, 0.5, 0.2)
    assert late.take(10**6) == 10**6 and late.cap(7) == 7 and late.has_room(state, 0)
    assert late.advance(state, 3) and state.progress.late_spans == [(0, 503), (0, 203)]


@pytest.mark.parametrize("rates", [(0.5,), (0.5, 0.2), (1.0, 1.0), (0.9, 0.5, 0.1)], ids=str)
@given(
    prompt=st.integers(WINDOW + 1, 300),
    generated=st.integers(0, 20),
    limits=st.lists(st.integers(WINDOW, 80), min_size=1, max_size=5),
)
def test_the_parts_of_a_late_prefill_follow_each_other(
    rates: tuple[float, ...], prompt: int, generated: int, limits: list[int]
) -> None:
    state = make_state(prompt, *rates)
    totals, done, finished, step = [n + generated for n in state.plan.kept_counts], [0] * len(rates), False, 0
    while not finished:
        late = LateRows(limit := limits[step % len(limits)], len(rates), WINDOW)
        finished = late.advance(state, generated)
        rows = [end - start for start, end in state.progress.late_spans]
        assert late.left == [limit - n for n in rows] and all(0 <= n <= limit for n in rows) and sum(rows) > 0
        for level, (start, end) in enumerate(state.progress.late_spans):
            assert start == done[level]
            assert end == 0 or level == 0 or state.progress.late_spans[level - 1][1] == totals[level - 1]
            # The part that ends a level before another prune has the window, whose queries rank.
            if start < end == totals[level] and level < len(rates) - 1:
                assert end - start >= WINDOW
        done, step = [end for _, end in state.progress.late_spans], step + 1
    assert done == totals


def test_a_full_step_has_no_room_for_a_part() -> None:
    late = LateRows(20, 1, WINDOW)
    late.take(20)
    assert not late.has_room(make_state(100), 0)


def test_what_is_left_holds_a_part_or_not() -> None:
    late = LateRows(20, 2, WINDOW)
    late.take(16)
    # Four rows are left. Of the rows that a second prune ranks, the last eight stay together.
    assert late.has_room(make_state(100, 0.5, 0.2), 0)
    assert late.has_room(make_state(20, 0.5, 0.4), 0)
    assert not late.has_room(make_state(20, 0.4, 0.3), 0)
    assert late.has_room(make_state(20, 0.4), 0)


def test_rows_after_the_second_prune_may_find_no_room() -> None:
    late, first, second = LateRows(30, 2, WINDOW), make_state(100, 0.5, 0.4), make_state(40, 0.25, 0.2)
    first.progress.late_spans = [(40, 50), (0, 10)]
    assert late.advance(first, 0) and late.left == [30, 0]
    assert not late.advance(second, 0) and second.progress.late_spans == [(0, 10), (0, 0)]
    assert LateRows(30, 2, WINDOW).advance(second, 0) and second.progress.late_spans == [(10, 10), (0, 8)]
