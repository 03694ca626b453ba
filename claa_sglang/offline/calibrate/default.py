"""What a calibration is worth: its choices beside the configuration that a server without a profile runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from claa_sglang.config.config import PruneStep
from claa_sglang.config.flags import ClaaFlags, resolve
from claa_sglang.offline.calibrate.evidence import Evidence, Kept
from claa_sglang.offline.calibrate.held_out import margin
from claa_sglang.offline.calibrate.price import Price
from claa_sglang.offline.calibrate.search import Candidate
from claa_sglang.offline.calibrate.target import Target


class Rival(NamedTuple):
    """A choice to hold against the default. why: what it was chosen for."""

    why: str
    choice: Candidate


def default_choice(evidence: Evidence, price: Price) -> Candidate:
    """The default of `--enable-claa` for a model of so many layers, and what it keeps of the calibration prompts."""
    steps: tuple[PruneStep, ...] = resolve(ClaaFlags(), num_layers=price.layers).steps
    (step,) = steps
    kept: Kept = evidence.kept(evidence.ranking(step.score_layers), [step.keep_rate])
    return Candidate(steps, price.share(steps), kept.mass[0], kept.recall[0])


def rivals(default: Candidate, candidates: Sequence[Candidate], target: Target) -> list[Rival]:
    """Of `candidates`: the best that is predicted no slower than the default, and the cheapest that keeps no less.

    Both by the calibration prompts alone, so that held-out text may judge them. One that does not exist is left out.
    """
    found = []
    if affordable := [one for one in candidates if one.share <= default.share]:
        best = max(affordable, key=lambda one: margin(one, target))
        found.append(Rival("most kept, no slower", best))
    if sufficient := [one for one in candidates if margin(one, target) >= margin(default, target)]:
        found.append(Rival("fastest, no less kept", min(sufficient, key=lambda one: one.share)))
    return found
