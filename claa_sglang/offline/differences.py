"""One ranker against others over the same prompts: paired differences, and how much of the gap to the oracle it closes.

Prompts differ far more than rankers do, so means side by side hide what a paired difference shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from scipy import stats

from claa_sglang.offline.interval import CONFIDENCE, Interval


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """`ours` minus `other` over the same prompts.

    Attributes:
        measure: of `measures.Measures`.
        mean: of each prompt's mean over the candidate layers. worst: of each prompt's lowest value over them.
        gap_closed: (ours - other) / (best - other) of the means: what is won of what could be won. None where the best
            ranking there is wins nothing over `other`.
    """

    measure: str
    ours: str
    other: str
    mean: Interval
    worst: Interval
    gap_closed: Interval | None


def differences(
    measure: str, values: Mapping[str, np.ndarray], ours: str, others: Sequence[str], best: np.ndarray
) -> list[Difference]:
    """`ours` against each of `others` in one measure.

    values: by ranker, fp64 [prompts, candidate layers]. best: the same of the best ranking there is.
    """
    return [
        Difference(
            measure=measure,
            ours=ours,
            other=other,
            mean=paired(values[ours].mean(axis=1) - values[other].mean(axis=1)),
            worst=paired(values[ours].min(axis=1) - values[other].min(axis=1)),
            gap_closed=_gap(*(kind.mean(axis=1) for kind in (values[ours], values[other], best))),
        )
        for other in others
    ]


def paired(change: np.ndarray) -> Interval:
    """Mean of paired differences with Student's t over prompts; fp64 [prompts], two or more."""
    mean, error = float(change.mean()), float(stats.sem(change))
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, change.size - 1))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def _gap(ours: np.ndarray, other: np.ndarray, best: np.ndarray) -> Interval | None:
    """The share with a bootstrap over prompts, seeded; fp64 [prompts] each."""

    def share(a: np.ndarray, b: np.ndarray, c: np.ndarray, axis: int = -1) -> np.ndarray:
        return (a - b).mean(axis=axis) / (c - b).mean(axis=axis)

    if not (best - other).mean() > 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sample without a gap divides by nothing, and is an infinite share
        found = stats.bootstrap(
            (ours, other, best), share, paired=True, confidence_level=CONFIDENCE, method="percentile", rng=0
        ).confidence_interval
    return Interval(mean=float(share(ours, other, best)), low=float(found.low), high=float(found.high))
