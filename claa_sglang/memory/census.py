"""Who owns each KV slot, and what each slot holds: the checks that run while the server is busy, when asked for.

A slot has at most one owner: the free list, a node of the radix tree, a request's own KV, or late slots.

A request reads only slots of its own kind: the late-layer rows of a slot hold KV if a dense request wrote it, and a
boundary state if a pruned one did. Kinds are recorded as slots are written, so a slot that reaches a request of another
kind is found however it got there: through the tree, a stale row or a freed slot.

Reads the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

UNWRITTEN, DENSE, PRUNED, LATE = range(4)
KINDS = ("unwritten", "dense KV", "boundary states", "late KV")
SHOWN = 5  # slots named in one message


class Owned(NamedTuple):
    """Slots (int64 `[n]`) and who has them, in words."""

    owner: str
    slots: Tensor


class Read(NamedTuple):
    """Slots (int64 `[n]`) that a request's row lists, and the kind they must be of."""

    reader: str
    slots: Tensor
    kind: int


class SlotCensus:
    """Kind of every slot.

    Args:
        size: slots of the pool, numbered 1 to size; 0 is reserved for writes that nobody reads.
    """

    def __init__(self, size: int, device: torch.device | str) -> None:
        self._size = size
        self.device = torch.device(device)
        self._kinds = torch.zeros(size + 1, dtype=torch.int8, device=device)

    def wrote(self, slots: Tensor, kind: int) -> None:
        """Record that `slots` (int64 `[n]`) now hold `kind`."""
        self._kinds[slots] = kind

    def strangers(self, reads: Iterable[Read]) -> list[str]:
        """Slots that a request reads and that hold something else than its kind, in words; empty when healthy."""
        problems = []
        for reader, slots, kind in reads:
            found = self._kinds[slots]
            wrong = found != kind
            if bool(wrong.any()):
                held = sorted({KINDS[i] for i in found[wrong].tolist()})
                problems.append(
                    f"{reader} reads {KINDS[kind]} from {_named(slots[wrong])}, which hold {', '.join(held)}"
                )
        return problems

    def shared(self, owned: Iterable[Owned]) -> list[str]:
        """Slots with two owners, in words; empty when healthy. Every owner lists each of its slots once."""
        owned = list(owned)
        counts = torch.zeros(self._size + 1, dtype=torch.int64, device=self.device)
        for _, slots in owned:
            counts.index_add_(0, slots, torch.ones_like(slots))
        twice = (counts > 1).nonzero().flatten()
        if twice.numel() == 0:
            return []
        owners = [owner for owner, slots in owned if bool(torch.isin(slots, twice).any())]
        return [f"{_named(twice)} have more than one owner: {', '.join(owners)}"]


def _named(slots: Tensor) -> str:
    listed = ", ".join(map(str, slots[:SHOWN].tolist()))
    return f"{slots.numel()} slots ({listed}{', …' if slots.numel() > SHOWN else ''})"
