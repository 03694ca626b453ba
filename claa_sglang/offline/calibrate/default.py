"""What a calibration is worth: its choices beside the configuration that a server without a profile runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from claa_sglang.config.flags import ClaaFlags, resolve
from claa_sglang.offline.calibrate.evidence import Evidence
from claa_sglang.offline.calibrate.held_out import margin
from claa_sglang.offline.calibrate.price import Price
from claa_sglang.offline.calibrate.ranker_list import read
from claa_sglang.offline.calibrate.search import Candidate
from claa_sglang.offline.calibrate.target import Target
from claa_sglang.ranking.spec import RankerSpec


class Rival(NamedTuple):
    """A choice to hold against the default. why: what it was chosen for."""

    why: str
    choice: Candidate


def default_ranker(layers: int) -> RankerSpec:
    """What a server of a model of so many layers ranks by without a profile."""
    return read([resolve(ClaaFlags(), num_layers=layers).ranker])[0]


def default_choice(evidence: Evidence, price: Price) -> Candidate:
    """The default of `--enable-claa` for a model of so many layers, and what it keeps of the calibration prompts."""
    steps, ranker = resolve(ClaaFlags(), num_layers=price.layers).steps, default_ranker(price.layers)
    (step,) = steps
    kept = evidence.kept(evidence.ranking(ranker, step.score_layers), [step.keep_rate])
    return Candidate(ranker, steps, price.share(steps), kept)


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
