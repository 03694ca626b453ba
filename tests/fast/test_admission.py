"""Where chunks end and what a pruned request costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.admission import MARGIN, LateRows, chunk_len, late_prefill_len, max_new_tokens
from claa_sglang.config import ClaaConfig, PruneStep
from claa_sglang.request import RequestOptions
from claa_sglang.state import RequestState

LENGTHS = st.integers(1, 300)
WINDOWS = st.integers(1, 40)


def make_state(prompt: int, keep_rate: float = 0.5) -> RequestState:
    step = PruneStep(prune_layer=0, keep_rate=keep_rate, score_layers=(0,))
    return RequestState.pruned_request(RequestOptions(), ClaaConfig(steps=(step,), num_layers=2), prompt)


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
    tokens = max_new_tokens(capacity, state)
    used = prompt + late_prefill_len(state, generated=0) + MARGIN
    assert used + 2 * tokens <= capacity < used + 2 * (tokens + 1)


@given(limit=st.integers(1, 50), rows=st.lists(st.integers(0, 60), max_size=6))
def test_a_step_takes_no_more_late_rows_than_a_chunk(limit: int, rows: list[int]) -> None:
    late = LateRows(limit)
    taken = [late.take(n) for n in rows]
    assert sum(taken) == min(limit, sum(rows)) and late.left == limit - sum(taken)
    assert late.cap(1000) == late.left


def test_without_chunks_nothing_is_bounded() -> None:
    late, state = LateRows(None), make_state(1000)
    assert late.take(10**6) == 10**6 and late.cap(7) == 7 and late.has_room(state, 0)
    assert late.advance(state, 3) and state.late_span == (0, 503)


@given(prompt=LENGTHS, generated=st.integers(0, 20), limits=st.lists(st.integers(1, 80), min_size=1, max_size=5))
def test_the_parts_of_a_late_prefill_follow_each_other(prompt: int, generated: int, limits: list[int]) -> None:
    state = make_state(prompt)
    total, done, finished, step = late_prefill_len(state, generated), 0, False, 0
    while not finished:
        late = LateRows(limit := limits[step % len(limits)])
        assert late.has_room(state, generated)
        finished = late.advance(state, generated)
        start, end = state.late_span
        assert start == done and 0 < end - start <= limit and late.left == limit - (end - start)
        done, step = end, step + 1
    assert done == total


def test_a_full_step_has_no_room_for_a_part() -> None:
    late = LateRows(20)
    late.take(20)
    assert not late.has_room(make_state(100), 0)


def test_with_two_prune_steps_a_late_prefill_is_one_part() -> None:
    first = PruneStep(prune_layer=0, keep_rate=0.5, score_layers=(0,))
    second = PruneStep(prune_layer=1, keep_rate=0.2, score_layers=(1,))
    state = RequestState.pruned_request(RequestOptions(), ClaaConfig(steps=(first, second), num_layers=3), 100)
    late = LateRows(30)
    assert not late.has_room(state, 0)
    assert late.advance(state, 0) and state.late_span == (0, 50) and late.left == 0
