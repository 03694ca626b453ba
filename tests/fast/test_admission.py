"""Where chunks end and what a pruned request costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.admission import MARGIN, chunk_len, late_prompt_slots, max_new_tokens
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
    assert late_prompt_slots(make_state(100), generated=0) == 50
    assert late_prompt_slots(make_state(100), generated=7) == 57


@given(prompt=LENGTHS, rate=st.floats(0.01, 1.0), capacity=st.integers(0, 1000))
def test_what_may_be_generated_fits_the_pool(prompt: int, rate: float, capacity: int) -> None:
    state = make_state(prompt, rate)
    tokens = max_new_tokens(capacity, state)
    used = prompt + late_prompt_slots(state, generated=0) + MARGIN
    assert used + 2 * tokens <= capacity < used + 2 * (tokens + 1)
