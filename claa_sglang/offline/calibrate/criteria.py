"""Whether a choice keeps what the target asks for, and how sure we are of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats
from torch import Tensor

from claa_sglang.offline.calibrate.evidence import Kept
from claa_sglang.offline.calibrate.target import Target

CONFIDENCE = 0.95  # one-sided: of a lower bound
RESAMPLES = 2000


class LowerBound(NamedTuple):
    """A mean over so many prompts and its lower bound; NaN over none."""

    mean: float
    low: float
    prompts: int


def lower_bound(values: Tensor, confidence: float = CONFIDENCE) -> LowerBound:
    """Mean of the values that are not NaN, and its one-sided lower confidence bound by the bootstrap over prompts.

    Percentile intervals: scipy's default (BCa) is undefined where all values are equal, as recall often is.
    Deterministic.
    """
    known = values.numpy()[~np.isnan(values.numpy())].astype(float)
    if known.size < 2:
        mean = float(known.mean()) if known.size else float("nan")
        return LowerBound(mean, float("-inf") if known.size else float("nan"), known.size)
    result = stats.bootstrap(
        (known,),
        np.mean,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        alternative="greater",
        method="percentile",
        rng=0,
    )
    return LowerBound(float(known.mean()), float(result.confidence_interval.low), known.size)


def margins(kept: Kept, target: Target) -> Tensor:
    """fp32 [R]: by how much the means over prompts exceed the target, the worse of mass and recall."""
    mass = kept.mass.mean(dim=1) - target.mass
    recall = kept.recall.nanmean(dim=1) - target.recall
    return mass.where(recall.isnan(), mass.minimum(recall))


class Measured(NamedTuple):
    """One choice on one set of prompts."""

    mass: LowerBound
    recall: LowerBound

    def misses(self, target: Target) -> str:
        """What falls short of the target with its lower bound; empty if nothing does."""
        missed = []
        for name, interval, wanted in (("mass", self.mass, target.mass), ("recall", self.recall, target.recall)):
            if interval.prompts and interval.low < wanted:
                missed.append(f"{name} {interval.mean:.3f}, at least {interval.low:.3f}, wanted {wanted:.3f}")
        return "; ".join(missed)


def measured(kept: Kept, row: int = 0, confidence: float = CONFIDENCE) -> Measured:
    """Means and lower bounds of one rate (row of `kept`)."""
    return Measured(lower_bound(kept.mass[row], confidence), lower_bound(kept.recall[row], confidence))
