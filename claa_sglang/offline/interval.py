"""A mean over prompts with its confidence interval, as studies and benchmarks report it."""

from __future__ import annotations

import msgspec

CONFIDENCE = 0.95  # two-sided


class Interval(msgspec.Struct, frozen=True):
    """A mean over prompts and its 95 % interval."""

    mean: float
    low: float
    high: float
