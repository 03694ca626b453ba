"""The kept count is a host-side function of the prompt length that never misbehaves at short prompts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_sglang.config.budget import kept_count, kept_counts

TOKENS = st.integers(min_value=0, max_value=1 << 20)
RATES = st.floats(min_value=0, max_value=1, exclude_min=True)
WINDOWS = st.integers(min_value=1, max_value=64)


@pytest.mark.parametrize(
    ("prompt_tokens", "keep_rate", "kept"),
    [
        (0, 0.2, 0),
        (1, 0.2, 1),
        (7, 0.2, 7),
        (8, 0.2, 8),
        (9, 0.2, 8),
        (39, 0.2, 8),  # int(7.8) is below the window
        (45, 0.2, 9),
        (80, 0.2, 16),
        (1025, 0.2, 205),
        (1025, 0.4, 410),
        (1025, 1.0, 1025),
        (131072, 0.1, 13107),
    ],
)
def test_known_counts(prompt_tokens: int, keep_rate: float, kept: int) -> None:
    assert kept_count(prompt_tokens, keep_rate, window=8) == kept


@settings(deadline=None)
@given(tokens=TOKENS, rate=RATES, window=WINDOWS)
def test_bounds(tokens: int, rate: float, window: int) -> None:
    kept = kept_count(tokens, rate, window)
    assert min(window, tokens) <= kept <= tokens
    assert kept == min(window, tokens) or kept == int(rate * tokens)
    assert kept_count(tokens, 1.0, window) == tokens


@settings(deadline=None)
@given(tokens=TOKENS, more=st.integers(0, 1000), rate=RATES, higher=RATES, window=WINDOWS)
def test_never_falls(tokens: int, more: int, rate: float, higher: float, window: int) -> None:
    kept = kept_count(tokens, rate, window)
    assert kept_count(tokens + more, rate, window) >= kept
    assert kept_count(tokens, max(rate, higher), window) >= kept


@settings(deadline=None)
@given(tokens=TOKENS, rates=st.lists(RATES, min_size=1, max_size=4), window=WINDOWS)
def test_falling_rates_give_subset_sizes(tokens: int, rates: list[float], window: int) -> None:
    falling = sorted(rates, reverse=True)
    counts = kept_counts(tokens, falling, window)
    assert counts == tuple(kept_count(tokens, rate, window) for rate in falling)
    assert list(counts) == sorted(counts, reverse=True)
