"""A cheap choice that text of another source confirms.

Layers chosen on one kind of text may be useless on another: on SmolLM2, scored layers 6, 8 and 9 keep every needle in
repeated sentences and 15 % of them in prose. So a choice counts for nothing until held-out text agrees.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from claa_sglang.offline.calibrate.criteria import (
    CONFIDENCE,
    LowerBound,
    Measured,
    least_for_most,
    margins,
    measured,
    measured_all,
    misses_whole,
    whole_together,
)
from claa_sglang.offline.calibrate.evidence import Kept
from claa_sglang.offline.calibrate.search import TIE, Candidate, frontier
from claa_sglang.offline.calibrate.target import CalibrationError, Target

TRIES = 5  # choices that the held-out text may judge: each further one makes luck more likely
# Several choices are tried, so each bound has its share of the error (Bonferroni).
HELD_OUT_CONFIDENCE = 1 - (1 - CONFIDENCE) / TRIES
TOGETHER = "all held-out text"


class Verdict(NamedTuple):
    """What held-out text says about a choice.

    measured: by source of text. misses: by source, or TOGETHER, what falls short; empty if the choice carries over.
    whole: of whole answers over all sources.
    """

    candidate: Candidate
    measured: dict[str, Measured]
    misses: dict[str, str]
    whole: LowerBound


def promising(candidates: Sequence[Candidate], target: Target) -> list[Candidate]:
    """Choices that reach the target on the calibration text with their lower bounds, cheapest first.

    Each is sturdier there than every cheaper one whose last scored layer is the same. Others are not compared: how much
    a choice keeps of this text says little about which of two layers holds on another, so a dearer layer is not passed
    over for keeping less here. Raises CalibrationError if there is none.
    """
    found = measured_all([one.kept for one in candidates])
    misses = [one.misses(target) for one in found]
    good = [one for one, missed in zip(candidates, misses, strict=True) if not missed]
    if not good:
        best = max(range(len(candidates)), key=lambda index: margin(candidates[index], target))
        raise CalibrationError(
            f"no choice keeps enough on the calibration prompts; the best, {candidates[best]}, misses: {misses[best]}. "
            "Allow higher --keep-rates or later --prune-layers, or ask for less (--target, --needle-recall, --whole)"
        )
    by_layer: dict[int, list[Candidate]] = {}
    for one in good:
        by_layer.setdefault(one.steps[-1].score_layers[-1], []).append(one)
    fronts = [frontier(of_layer, lambda one: sturdiness(one, target)) for of_layer in by_layer.values()]
    return sorted(itertools.chain(*fronts), key=lambda one: (one.share, -margin(one, target)))


def margin(candidate: Candidate, target: Target) -> float:
    """By how much the means on the calibration text exceed the target."""
    return float(margins(candidate.kept, target)[0])


def sturdiness(candidate: Candidate, target: Target) -> float:
    """Its margin, and a little for how much higher its keep rate is than the one at which most answers are whole: where
    all are, a higher rate has no larger margin, and holds better on other text."""
    return margin(candidate, target) + TIE * (
        candidate.steps[-1].keep_rate - least_for_most(candidate.kept, target.whole)
    )


def spread(candidates: Sequence[Candidate]) -> list[Candidate]:
    """At most TRIES of them, which come cheapest first: the cheapest, the dearest, and some between, close at first.

    Neighbours read nearly the same layers, so where one is rejected the next one is, and they would use up all tries.
    """
    if len(candidates) <= TRIES:
        return list(candidates)
    first, last = candidates[0].share, candidates[-1].share
    picked: list[int] = []
    for i in range(TRIES):
        least = first + (last - first) * (i / (TRIES - 1)) ** 2
        after = picked[-1] + 1 if picked else 0
        enough = (n for n in range(after, len(candidates)) if candidates[n].share >= least - 1e-9)
        if (found := next(enough, None)) is not None:
            picked.append(found)
    return [candidates[n] for n in picked]


def verdicts(
    candidates: Sequence[Candidate], judge: Callable[[Candidate], Mapping[str, Kept]], target: Target
) -> Iterator[Verdict]:
    """Judge `spread` of `candidates` on held-out text, up to the first that carries over.

    judge: what a candidate keeps of the held-out prompts, by source. Mass and recall must reach the target by their
    lower bounds in every source, and whole answers by that over all sources together: an exact bound of a share needs
    more prompts than a source has. In every source, and at every length in it, the means must reach it as well.
    """
    for candidate in spread(candidates):
        kept = judge(candidate)
        found = {source: measured(one, confidence=HELD_OUT_CONFIDENCE) for source, one in kept.items()}
        misses = {s: missed for s, one in found.items() if (missed := one.misses(target, whole_by_mean=True))}
        whole = whole_together(list(kept.values()), HELD_OUT_CONFIDENCE)
        if missed := misses_whole(whole, target):
            misses[TOGETHER] = missed
        yield Verdict(candidate, found, misses, whole)
        if not misses:
            return


def require_one(tried: Sequence[Verdict], calibrated_on: str) -> Verdict:
    """The verdict that carries over, the last of `tried`. Raises CalibrationError if none does."""
    last = tried[-1]
    if not last.misses:
        return last
    missed = "; ".join(f"{source}: {text}" for source, text in last.misses.items())
    raise CalibrationError(
        f"rejected: none of {len(tried)} choices made on {calibrated_on} carries over to held-out text. The last, "
        f"{last.candidate}, misses {missed}. Calibrate on prompts of more kinds (--prompts, --sources) or on more of "
        "them (--count), allow higher --keep-rates, or ask for less (--target, --needle-recall, --whole)"
    )
