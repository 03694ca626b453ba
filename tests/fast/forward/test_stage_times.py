"""Seconds of stages are counted where somebody reads them, and a stage that fails is not."""

from __future__ import annotations

import time

import pytest
import torch

from claa_sglang.forward import stage_times
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


class Event:
    """A CUDA event that passes when `now` says so; each takes half a second after the one before it."""

    made, now = 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.number = Event.made = Event.made + 1

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.number <= Event.now

    def elapsed_time(self, other: Event) -> float:
        return 500.0 * (other.number - self.number)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    Event.made = Event.now = 0
    return monkeypatch


def test_a_gpu_s_stages_are_counted_once_they_have_passed(on_gpu: pytest.MonkeyPatch) -> None:
    times = StageTimes(torch.device("cuda"))
    for _ in range(3):
        with times.stage(SCORE):
            pass
    times.collect()
    assert times.seconds[SCORE] == 0.0
    Event.now = 4  # of six
    for _ in range(2):
        times.collect()
        assert times.seconds[SCORE] == 1.0
    Event.now = 6
    times.collect()
    assert times.seconds == {SCORE: 1.5, PRUNE: 0.0}


def test_none_of_many_layers_is_dropped(on_gpu: pytest.MonkeyPatch) -> None:
    times = StageTimes(torch.device("cuda"))
    for _ in range(500):
        with times.stage(SCORE):
            pass
    Event.now = 1000
    times.collect()
    assert times.seconds[SCORE] == 250.0 and stage_times.PENDING >= 500


def test_nothing_is_recorded_while_a_graph_is_captured(on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    times = StageTimes(torch.device("cuda"))
    with times.stage(PRUNE):
        pass
    assert Event.made == 0
