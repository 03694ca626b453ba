"""Whether a choice keeps what the target asks for, and how sure we are of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from claa_sglang.offline.calibrate.evidence import Kept, together
from claa_sglang.offline.calibrate.target import Target

CONFIDENCE = 0.95  # one-sided: of a lower bound
RESAMPLES = 2000


class LowerBound(NamedTuple):
    """A mean over so many prompts and its lower bound; NaN over none."""

    mean: float
    low: float
    prompts: int


class Means(NamedTuple):
    """Over the prompts of one length; NaN where no answer is known."""

    mass: float
    recall: float
    whole: float


def lower_bounds(values: Tensor, confidence: float = CONFIDENCE) -> list[LowerBound]:
    """Of each row of [C, P], mean and one-sided lower confidence bound of the values that are not NaN.

    The bootstrap over prompts, percentile intervals, the same resamples for all rows (which know the same prompts):
    one product of matrices. Deterministic.
    """
    known = values[:, ~values[0].isnan()].double().numpy()
    count = known.shape[1]
    if count < 2:
        low = float("-inf") if count else float("nan")
        return [LowerBound(float(row.mean()) if count else float("nan"), low, count) for row in known]
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    lows = np.quantile(drawn @ known.T, 1 - confidence, axis=0)
    # A mean of equal values differs from them by rounding.
    return [
        LowerBound(float(row.mean()), float(max(low, row.min())), count) for row, low in zip(known, lows, strict=True)
    ]


def whole_bound(values: Tensor, confidence: float = CONFIDENCE) -> LowerBound:
    """Share of ones and its one-sided lower bound, exact (Clopper and Pearson); of [P], those that are not NaN."""
    known = values[~values.isnan()]
    count, ones = known.numel(), int(known.sum())
    if not count:
        return LowerBound(float("nan"), float("nan"), 0)
    low = binomtest(ones, count, alternative="greater").proportion_ci(confidence, method="exact").low
    return LowerBound(ones / count, float(low), count)


def least_prompts(whole: float, confidence: float = CONFIDENCE) -> int:
    """So many prompts, all of them whole, are needed for a lower bound of `whole`, below 1."""
    return math.ceil(math.log(1 - confidence) / math.log(whole)) if whole > 0 else 0


def margins(kept: Kept, target: Target) -> Tensor:
    """fp32 [R]: by how much the means over prompts exceed the target, the worst of the criteria and the lengths."""
    worst = torch.full(kept.mass.shape[:1], torch.inf)
    for one in _by_length(kept).values():
        mass = one.mass.mean(dim=1) - target.mass
        recall = one.recall.nanmean(dim=1) - target.recall
        whole = one.whole.nanmean(dim=1) - target.whole
        answers = recall.minimum(whole)
        worst = worst.minimum(mass.where(answers.isnan(), mass.minimum(answers)))
    return worst


def least_for_most(kept: Kept, share: float) -> float:
    """The lowest keep rate at which so many of the prompts are whole; at most 1, and 0 where no answer is known."""
    known = kept.least[~kept.least.isnan()].clamp(max=1.0).sort().values
    return float(known[max(0, math.ceil(share * known.numel()) - 1)]) if known.numel() else 0.0


class Measured(NamedTuple):
    """One choice on one set of prompts. lengths: by the length prompts were made for, where there are several."""

    mass: LowerBound
    recall: LowerBound
    whole: LowerBound
    lengths: dict[int, Means]

    def misses(self, target: Target, *, whole_by_mean: bool = False) -> str:
        """What falls short of the target, with its lower bound over all lengths or its mean over one; empty if none.

        whole_by_mean: the bound of whole answers is taken elsewhere, over more prompts.
        """
        missed = []
        for name, found, wanted in (("mass", self.mass, target.mass), ("recall", self.recall, target.recall)):
            if found.prompts and found.low < wanted:
                missed.append(f"{name} {found.mean:.3f}, at least {found.low:.3f}, wanted {wanted:.3f}")
        if whole_by_mean and self.whole.prompts and self.whole.mean < target.whole:
            missed.append(f"whole answers {self.whole.mean:.3f}, wanted {target.whole:.3f}")
        elif not whole_by_mean and (text := misses_whole(self.whole, target)):
            missed.append(text)
        for length, means in self.lengths.items():
            for name, mean in means._asdict().items():
                if mean < getattr(target, name):
                    missed.append(f"{name} {mean:.3f} at {length} tokens, wanted {getattr(target, name):.3f}")
        return "; ".join(missed)


def misses_whole(found: LowerBound, target: Target) -> str:
    """Whether a bound of whole answers falls short; empty if it does not."""
    if not found.prompts or found.low >= target.whole:
        return ""
    return (
        f"whole answers {found.mean:.3f}, at least {found.low:.3f}, wanted {target.whole:.3f} ({found.prompts} prompts)"
    )


def measured(kept: Kept, row: int = 0, confidence: float = CONFIDENCE) -> Measured:
    """Means and lower bounds of one rate (row of `kept`)."""
    return measured_all([kept.row(row)], confidence)[0]


def measured_all(choices: Sequence[Kept], confidence: float = CONFIDENCE) -> list[Measured]:
    """Of several choices, one rate each, on the same prompts."""
    masses = lower_bounds(torch.cat([one.mass for one in choices]), confidence)
    recalls = lower_bounds(torch.cat([one.recall for one in choices]), confidence)
    return [
        Measured(mass, recall, whole_bound(one.whole[0], confidence), _means(one))
        for one, mass, recall in zip(choices, masses, recalls, strict=True)
    ]


def whole_together(several: Sequence[Kept], confidence: float = CONFIDENCE) -> LowerBound:
    """Whole answers of one choice over several sets of prompts."""
    return whole_bound(together(several).whole[0], confidence)


def _means(kept: Kept) -> dict[int, Means]:
    parts = _by_length(kept)
    if len(parts) < 2:
        return {}
    return {
        length: Means(float(one.mass.mean()), float(one.recall.nanmean()), float(one.whole.nanmean()))
        for length, one in parts.items()
    }


def _by_length(kept: Kept) -> dict[int, Kept]:
    lengths = kept.lengths.unique().tolist()
    if len(lengths) == 1:
        return {lengths[0]: kept}
    return {length: Kept(*(tensor[..., kept.lengths == length] for tensor in kept)) for length in lengths}
