"""How long a step of finishing is: in time, and within what the operator and the scheduler allow."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.finishing.step_size import LEAST, SECONDS, step_tokens, step_work
from claa_sglang.policy.cost import Constants, CostModel, span_work

CONFIG = ClaaConfig(steps=(PruneStep(prune_layer=15, keep_rate=0.2, score_layers=(15,)),), num_layers=32)
H200 = Constants(per_pass=5e-5, per_row=7.2e-7, per_pair=2.7e-11, per_prune=1e-3, per_eager=1e-4)
CHUNK = 8192


def tokens(
    cost: Constants = H200, start: int = 0, left: int = 10**6, chunk: int = CHUNK, own: int | None = None
) -> int:
    return step_tokens(msgspec.structs.replace(CONFIG, finish_chunk=own), CostModel(cost), start, left, chunk)


def slower(factor: float) -> Constants:
    return Constants(*(factor * seconds for seconds in H200))


@settings(max_examples=60, deadline=None)
@given(
    factor=st.floats(0.01, 100),
    start=st.integers(0, 200_000),
    left=st.integers(1, 3000),
    chunk=st.integers(1, 3000),
)
def test_it_is_the_largest_that_is_expected_to_be_in_time(factor: float, start: int, left: int, chunk: int) -> None:
    cost = CostModel(slower(factor))
    most = min(left, chunk)
    in_time = [
        count for count in range(1, most + 1) if cost.seconds(step_work(CONFIG, start, start + count)) <= SECONDS
    ]
    expected = max(max(in_time, default=1), min(LEAST, most))
    assert tokens(slower(factor), start, left, chunk) == expected


@given(own=st.integers(1, 10_000), left=st.integers(1, 20_000), chunk=st.integers(1, 10_000))
def test_the_operator_s_number_wins_over_the_estimate(own: int, left: int, chunk: int) -> None:
    for factor in (1e6, 1e-6):
        assert tokens(slower(factor), 0, left, chunk, own) == min(own, left, chunk)


def test_it_is_no_more_than_a_chunk_of_the_scheduler() -> None:
    assert tokens(slower(1e-6), chunk=300) == tokens(own=10**6, chunk=300) == 300


@pytest.mark.parametrize(("left", "chunk"), [(1, CHUNK), (10, CHUNK), (10**6, 1), (10**6, 10)])
def test_a_step_of_a_slow_machine_has_some_tokens(left: int, chunk: int) -> None:
    assert tokens(slower(1e6), left=left, chunk=chunk) == min(left, chunk)
    assert tokens(slower(1e6)) == LEAST


def test_a_faster_machine_computes_more_at_once() -> None:
    steps = [tokens(slower(factor)) for factor in (1, 0.5, 0.25)]
    assert LEAST < steps[0] < steps[1] < steps[2] < CHUNK


def test_further_into_a_long_prefix_steps_are_shorter() -> None:
    """Each row attends to all before it."""
    steps = [tokens(slower(0.5), start) for start in (0, 30_000, 100_000)]
    assert steps[0] > steps[1] > steps[2] > LEAST


def test_its_work_is_what_its_tokens_add_in_the_late_layers() -> None:
    work = step_work(CONFIG, 100, 150)
    assert work == span_work(16, 100, 150)._replace(passes=0, eager=0) and work.rows == 16 * 50


def test_launching_does_not_make_a_step_shorter() -> None:
    """It takes what it takes, and a step of a few tokens would finish nothing in the pause between two questions."""
    slow_to_launch = H200._replace(per_pass=5e-4, per_eager=1e-3)
    assert tokens(slow_to_launch) == tokens() > 500
