"""Prefills under way: what the prefix cache will have once they get there, and does not have yet."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Prefill(NamedTuple):
    """A prompt whose prefill was admitted.

    key: its namespace; only prompts of the same one share. alive: whether it is still under way, asked from the step
    after its admission on. ends: whether all of it will have been computed after the step that is being made.
    """

    tokens: Sequence[int]
    key: Hashable
    alive: Callable[[], bool]
    ends: Callable[[], bool]


class InFlight:
    """The prefills under way. `step` counts scheduling steps."""

    def __init__(self) -> None:
        self.step = 0
        self._prefills: list[Prefill] = []

    def begin_step(self) -> None:
        """A new step is being made: forget who ended, failed or was retracted."""
        self.step += 1
        self._prefills = [prefill for prefill in self._prefills if prefill.alive()]

    def add(self, prefill: Prefill) -> None:
        """A prefill was admitted to the step that is being made."""
        self._prefills.append(prefill)

    def shared(self, tokens: Sequence[int], key: Hashable, limit: int) -> tuple[int, bool]:
        """How many of the first `limit` tokens some prefill of this namespace is computing, and whether it ends."""
        longest, ends = 0, False
        for prefill in self._prefills:
            if prefill.key == key:
                length = _common(prefill.tokens, tokens, limit)
                if length > longest or (length == longest and length and not ends):
                    longest, ends = length, prefill.ends()
        return longest, ends


def _common(left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """Length of the beginning that two sequences share, of the first `limit` tokens."""
    end = max(0, min(len(left), len(right), limit))
    if not end or left[0] != right[0]:
        return 0
    differ = np.asarray(left)[:end] != np.asarray(right)[:end]
    return int(differ.argmax()) if differ.any() else end
