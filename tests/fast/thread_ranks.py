"""Tensor-parallel ranks as threads of one process, for tests: everything that they exchange is real, but in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SECONDS = 20.0  # a rank that waits longer was left alone, which is what such a test looks for


class _Meeting:
    """Where all ranks put something down and take what all have put."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=SECONDS)
        self._brought: dict[int, Any] = {}

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._brought[rank] = value
        self._barrier.wait()
        found = [self._brought[i] for i in range(self.size)]
        self._barrier.wait()
        return found


class ThreadRanks:
    """See `Ranks`. `log`: names of what was called, in order."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank, self.size, self.checked = rank, meeting.size, True
        self.log: list[str] = []
        self._meeting = meeting

    def largest(self, values: Tensor) -> None:
        assert values.is_contiguous()
        found = self._exchange("largest", values.clone())
        values.copy_(torch.stack(found).amax(dim=0))

    def gather(self, values: Tensor) -> list[Tensor]:
        return self._exchange("gather", values)

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        return [any(of_one) for of_one in zip(*self._exchange("any_of", list(flags)), strict=True)]

    def are_same(self, values: Sequence[Tensor]) -> bool:
        found = self._exchange("are_same", [value.tolist() for value in values])
        return all(one == found[0] for one in found)

    def _exchange(self, name: str, value: Any) -> list[Any]:
        self.log.append(name)
        names, values = zip(*self._meeting.exchange(self.rank, (name, value)), strict=True)
        assert len(set(names)) == 1, f"ranks call {names} at a time: they would wait for ever"
        return list(values)


def on_ranks(size: int, work: Callable[[ThreadRanks], T]) -> list[T]:
    """`work` on each rank at a time; what each returned. Raises what one of them raised."""
    meeting = _Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return [done.result() for done in [pool.submit(work, ThreadRanks(meeting, rank)) for rank in range(size)]]
