"""Paired differences of rankers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from claa_sglang.offline.differences import differences


def test_the_interval_is_the_paired_t_tests() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(12, 1)) * 5  # prompts differ far more than rankers
    ours, other = prompts + rng.normal(size=(12, 6)), prompts + rng.normal(size=(12, 6)) - 0.5
    (found,) = differences("mass", {"a": ours, "b": other}, "a", ["b"], prompts + 10)
    for got, of in ((found.mean, np.mean), (found.worst, np.min)):
        expected = stats.ttest_rel(of(ours, axis=1), of(other, axis=1)).confidence_interval(0.95)
        assert (got.low, got.high) == pytest.approx((expected.low, expected.high))
    assert (found.ours, found.other) == ("a", "b")


def test_the_gap_is_what_is_won_of_what_could_be() -> None:
    other, best = np.full((4, 3), 0.5), np.full((4, 3), 0.9)
    values = {"a": np.full((4, 3), 0.8), "b": other, "c": best}
    of_b, of_c = differences("mass", values, "a", ["b", "c"], best)
    assert of_b.gap_closed is not None and of_b.gap_closed.mean == pytest.approx(0.75)
    assert of_c.gap_closed is None


def test_the_gap_has_an_interval_that_holds_it() -> None:
    rng = np.random.default_rng(1)
    best = rng.uniform(0.8, 0.9, size=(40, 5))
    values = {"a": best - rng.uniform(0, 0.1, size=best.shape), "b": best - rng.uniform(0, 0.4, size=best.shape)}
    gap = differences("mass", values, "a", ["b"], best)[0].gap_closed
    assert gap is not None and gap.low < gap.mean < gap.high and gap.high - gap.low < 0.2
