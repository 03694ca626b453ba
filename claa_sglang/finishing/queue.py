"""Pruned prefixes that wait to be made dense, the most recently used first.

Host-side: no torch, no SGLang. A prefix is only named here. How much of it is cached, pruned and dense, is read from
the prefix cache in every step, so what was evicted or flushed meanwhile is simply not found there.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

FLOOR = 512  # tokens; a shorter prefix is not worth a follow-up's while
CAPACITY = 1_000_000  # tokens of all that wait, where nothing is said of the prefix cache they are in


class Prefix(NamedTuple):
    """Tokens that a pruned request left in the prefix cache.

    tokens: array("q"), its prompt and what was generated and cached. key: its namespace and the client's salt, as
    SGLang's radix keys have them. priority: of the request, which the dense copy inherits.
    """

    tokens: array[int]
    key: tuple[str, str | None]
    priority: int = 0


class FinishQueue:
    """The prefixes that wait. `dropped` counts those that were given up: evicted, without room, failed, or too many.

    Args:
        floor: tokens that a prefix must have, at least.
        capacity: tokens of all prefixes together, at most; beyond it the least recently used are dropped. Each one that
            is added is compared with all that wait.
    """

    def __init__(self, floor: int = FLOOR, capacity: int = CAPACITY) -> None:
        self.floor = floor
        self.dropped = 0
        self._capacity = capacity
        self._waiting: OrderedDict[tuple[Hashable, bytes], Prefix] = OrderedDict()  # the last one is next
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, prefix: Prefix) -> None:
        """A prefix was used. It is next, in place of every one that it continues.

        One that another continues already waits as that one, which is next then.
        """
        if len(prefix.tokens) < self.floor:
            return
        own = prefix.tokens.tobytes()
        for place in [place for place in self._waiting if place[0] == prefix.key]:
            if own.startswith(place[1]):
                self._remove(place)
            elif place[1].startswith(own):
                self._waiting.move_to_end(place)
                return
        self._waiting[prefix.key, own] = prefix
        self._tokens += len(prefix.tokens)
        while self._tokens > self._capacity and len(self._waiting) > 1:
            self._remove(next(iter(self._waiting)))
            self.dropped += 1

    def first(self) -> Prefix | None:
        """The most recently used one; None if nothing waits."""
        return next(reversed(self._waiting.values())) if self._waiting else None

    def remove(self, prefix: Prefix) -> None:
        """It is finished, or is not to be. One that does not wait is fine."""
        place = (prefix.key, prefix.tokens.tobytes())
        if place in self._waiting:
            self._remove(place)

    def clear(self) -> None:
        """Forget all of them; the prefix cache was emptied."""
        self._waiting.clear()
        self._tokens = 0

    def _remove(self, place: tuple[Hashable, bytes]) -> None:
        self._tokens -= len(self._waiting.pop(place).tokens)
