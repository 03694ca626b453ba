"""Times of prefill steps for the cost model, without waiting: CUDA events are read when they have passed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from claa_sglang.policy.cost import CostModel, Work

PENDING = 64  # steps whose events have not passed; more are dropped, oldest first


class Step:
    """One forward. work: what it did; none teaches nothing."""

    work = Work()


class StepTimer:
    """Feeds a cost model with what forwards took on this device."""

    def __init__(self, cost: CostModel, device: torch.device) -> None:
        self._cost = cost
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[Work, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=PENDING)

    @contextmanager
    def step(self) -> Iterator[Step]:
        """Around one forward; what it did is to be set before the end. One that raises is not counted."""
        step = Step()
        if not self._cuda:
            start = time.perf_counter()
            yield step
            self._cost.observe(step.work, time.perf_counter() - start)
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield step
        events[1].record()
        self._pending.append((step.work, *events))

    def collect(self) -> None:
        """Hand on the steps that the device has finished."""
        while self._pending and self._pending[0][2].query():
            work, start, end = self._pending.popleft()
            self._cost.observe(work, start.elapsed_time(end) / 1000)
