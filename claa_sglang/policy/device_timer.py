"""Times of work on a device, without waiting: CUDA events are read when they have passed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

PENDING = 64  # pieces of work whose events have not passed

T = TypeVar("T")


class DeviceTimer(Generic[T]):
    """Tells what pieces of work took.

    Args:
        device: where they run. On a CPU they are timed as they are done.
        tell: called with a piece of work and its seconds; on a GPU by `collect`.
        pending: pieces whose events have not passed, at most; more are dropped, oldest first.
    """

    def __init__(self, device: torch.device, tell: Callable[[T, float], None], pending: int = PENDING) -> None:
        self._cuda = device.type == "cuda"
        self._tell = tell
        self._pending: deque[tuple[T, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=pending)

    @contextmanager
    def around(self, work: T) -> Iterator[T]:
        """Around one piece of work. One that raises is not counted."""
        if not self._cuda:
            start = time.perf_counter()
            yield work
            self._tell(work, time.perf_counter() - start)
            return
        if torch.cuda.is_current_stream_capturing():  # a graph's events have no times
            yield work
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield work
        events[1].record()
        self._pending.append((work, *events))

    def collect(self) -> None:
        """Tell of what the device has finished."""
        while self._pending and self._pending[0][2].query():
            work, start, end = self._pending.popleft()
            self._tell(work, start.elapsed_time(end) / 1000)
