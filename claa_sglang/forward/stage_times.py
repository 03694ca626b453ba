"""Seconds that CLAA's own stages of a prefill take on the device: scoring, and pruning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from claa_sglang.policy.device_timer import DeviceTimer

SCORE, PRUNE = "score", "prune"
# Stages that the device has not finished when they are counted: one for each scored layer, of some steps. None of them
# may be dropped, as the sum would be too small.
PENDING = 4096


class StageTimes:
    """Names the stages in a profiler's trace and, where somebody reads it, times them.

    Args:
        device: of the model; None times nothing, which then costs nothing.

    seconds: by stage, of the work that the device has finished and `collect` has found.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds = {SCORE: 0.0, PRUNE: 0.0}
        self._timer: DeviceTimer[str] | None = None if device is None else DeviceTimer(device, self._add, PENDING)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around one stage of a forward, SCORE or PRUNE. One that raises is not counted."""
        with record_function(f"claa::{name}"):
            if self._timer is None:
                yield
                return
            with self._timer.around(name):
                yield

    def collect(self) -> None:
        """Count what the device has finished since."""
        if self._timer is not None:
            self._timer.collect()

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds
