"""The cost model: how much work a prefill is, and that constants are found from the times of steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.policy.cost import BOUNDS, Constants, CostModel, Work, prefill_work, pruned_work, span_work

TRUE = Constants(per_pass=2e-4, per_row=1e-6, per_pair=1e-10, per_prune=3e-3, per_eager=3e-4)


def brute_work(layers: int, prefix: int, end: int, chunk: int, graph_tokens: int) -> Work:
    passes = rows = pairs = eager = 0
    start = prefix
    while start < end:
        stop = min(end, start + chunk)
        passes += layers
        eager += layers if stop - start > graph_tokens else 0
        for position in range(start, stop):
            rows += layers
            pairs += layers * (position + 1)
        start = stop
    return Work(passes, rows, pairs, eager=eager)


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 60), st.integers(1, 30), st.integers(0, 40))
def test_work_of_a_prefill_is_that_of_its_chunks(
    layers: int, prefix: int, new: int, chunk: int, graph_tokens: int
) -> None:
    assert prefill_work(layers, prefix, prefix + new, chunk, graph_tokens) == pytest.approx(
        brute_work(layers, prefix, prefix + new, chunk, graph_tokens)
    )


def test_work_of_a_pruned_prefill() -> None:
    expected = prefill_work(4, 30, 100, 16)
    for layers, kept in ((3, 40), (5, 10)):
        expected = expected.plus(prefill_work(layers, 0, kept, 16))
    assert pruned_work([3, 6], [40, 10], 12, 30, 100, 16) == expected._replace(prunes=1)


def steps(count: int, seed: int = 0) -> list[Work]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prefix, rows = int(rng.integers(0, 8000)), int(rng.integers(16, 4000))
        eager, prunes = (0.0, 0.0) if rng.integers(0, 2) else (32.0, float(rng.integers(0, 2)))
        found.append(span_work(32, prefix, prefix + rows)._replace(prunes=prunes, eager=eager))
    return found


def seconds(work: Work) -> float:
    return float(np.dot(work, TRUE))


@pytest.mark.parametrize("off", [1.0, 0.3, 4.0])
def test_constants_are_learned_from_steps(off: float) -> None:
    model = CostModel(Constants(*(off * np.array(TRUE)).tolist()))
    for work in steps(300):
        model.observe(work, seconds(work))
    for work in steps(50, seed=1):
        assert model.seconds(work) == pytest.approx(seconds(work), rel=0.05)


def test_one_slow_step_does_not_spoil_it() -> None:
    model = CostModel(TRUE)
    for index, work in enumerate(steps(100)):
        model.observe(work, 1000.0 if index == 50 else seconds(work))
    for work in steps(20, seed=1):
        assert model.seconds(work) == pytest.approx(seconds(work), rel=0.15)


def test_what_no_step_has_shown_stays_as_measured() -> None:
    model = CostModel(TRUE)
    for _ in range(100):
        work = span_work(32, 0, 1000)  # no prune among them
        model.observe(work, 2 * seconds(work))
    assert model.constants.per_prune == pytest.approx(TRUE.per_prune)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_any_times_leave_constants_that_can_be_used(times: list[float]) -> None:
    model = CostModel(TRUE)
    for work, time in zip(steps(len(times)), times, strict=True):
        model.observe(work, time)
    ratios = np.array(model.constants) / np.array(TRUE)
    assert np.all(np.isfinite(ratios)) and np.all(ratios >= BOUNDS[0] * 0.999) and np.all(ratios <= BOUNDS[1] * 1.001)


def test_a_step_that_does_nothing_teaches_nothing() -> None:
    model = CostModel(TRUE)
    model.observe(Work(), 1.0)
    assert model.constants == pytest.approx(TRUE) and model.steps == 0
