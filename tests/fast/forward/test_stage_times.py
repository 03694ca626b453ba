"""Seconds of stages are counted where somebody reads them, and a stage that fails is not."""

from __future__ import annotations

import time

import pytest
import torch

from claa_sglang.forward.stage_times import PRUNE, SCORE, StageTimes


def test_each_stage_has_its_seconds() -> None:
    times = StageTimes(torch.device("cpu"))
    for seconds in (0.02, 0.03):
        with times.stage(SCORE):
            time.sleep(seconds)
    with times.stage(PRUNE):
        time.sleep(0.01)
    times.collect()
    assert 0.05 <= times.seconds[SCORE] < 0.1 and 0.01 <= times.seconds[PRUNE] < 0.05


def test_nothing_is_timed_where_nobody_reads_it() -> None:
    times = StageTimes()
    with times.stage(SCORE):
        time.sleep(0.01)
    times.collect()
    assert times.seconds == {SCORE: 0.0, PRUNE: 0.0}


def test_a_stage_that_fails_is_not_counted() -> None:
    times = StageTimes(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), times.stage(PRUNE):
        _ = 1 / 0
    assert times.seconds[PRUNE] == 0.0
