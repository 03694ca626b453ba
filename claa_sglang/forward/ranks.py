"""Tensor-parallel ranks: each has some of the model's KV heads, and all must keep the same tokens and end the same
requests. What a forward asks of them; on SGLang's groups it is `patches/ranks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class RankFailed(RuntimeError):
    """Another rank failed in the same place; its log has the cause."""

    def __init__(self) -> None:
        super().__init__("another tensor-parallel rank failed here; its log has the cause")


class RanksDiffer(RuntimeError):
    """Ranks did not choose the same tokens: looked for where SGLang's own checks of every step are on."""


class Ranks(Protocol):
    """All ranks of one model, two or more. Each calls the same methods in the same order, with equal shapes.

    size: how many there are. checked: whether what they chose is compared in every forward.
    """

    size: int
    checked: bool

    def largest(self, values: Tensor) -> None:
        """In place, contiguous: the largest value that any rank has."""

    def gather(self, values: Tensor) -> list[Tensor]:
        """`values` of every rank, in their order."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Which of these are set on any rank. The host waits for all of them, not for a device."""

    def are_same(self, values: Sequence[Tensor]) -> bool:
        """Whether every rank has these values. Waits for the device."""
