"""From prompts answered by each variant to accuracy beside dense."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

ALL = "all"  # tasks together
DENSE, AGAIN = "dense", "dense, again"  # again: read in one forward, as variants are; what differs is rounding


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt by one variant. right: grade of its answer, 0 to 1; the rest as in `answering.Answer`."""

    key: str
    task: str
    length: int
    variant: str
    right: float
    same: bool
    logprob: float | None = None
    share: float | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts of a length and task by one variant.

    Attributes:
        n: prompts. right: mean grade. difference: right less dense's, of the same prompts, with its 95 % interval.
        same: share of prompts whose answer is dense's to the token.
        logprob: mean log probability of the dense answers' tokens. share: mean share of weight that is read.
    """

    length: int
    task: str
    variant: str
    n: int
    right: float
    difference: tuple[float, float, float]
    same: float
    logprob: float | None
    share: float | None


def rows(found: Iterable[Outcome]) -> list[Row]:
    """For each length and variant, over all tasks and for each; of prompts that dense answered. As they appear."""
    by_prompt: dict[str, dict[str, Outcome]] = defaultdict(dict)
    for one in found:
        by_prompt[one.key][one.variant] = one
    together: dict[tuple[int, str, str], list[tuple[Outcome, Outcome]]] = defaultdict(list)
    for variants in by_prompt.values():
        if (dense := variants.get(DENSE)) is None:
            continue
        for name, one in variants.items():
            for task in (ALL, one.task):
                together[one.length, task, name].append((one, dense))
    return [_row(*group, pairs) for group, pairs in together.items()]


def _row(length: int, task: str, variant: str, pairs: Sequence[tuple[Outcome, Outcome]]) -> Row:
    right, dense = (np.array([pair[i].right for pair in pairs]) for i in (0, 1))
    return Row(
        length=length,
        task=task,
        variant=variant,
        n=len(pairs),
        right=float(right.mean()),
        difference=_interval(right - dense),
        same=float(np.mean([one.same for one, _ in pairs])),
        logprob=_mean(one.logprob for one, _ in pairs),
        share=_mean(one.share for one, _ in pairs),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval, by the normal distribution; that of fewer than two prompts is not known: infinite."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half
