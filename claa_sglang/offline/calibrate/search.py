"""The best scored layers for every prune layer and keep rate, and for a second prune after them.

A beam search over sets of layers, with every set judged once for all rates. All sets are too many (2^20 at 20 layers),
and the best set of one size need not hold the best of a smaller one, which is what a beam of several is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from claa_sglang.config.config import PruneStep
from claa_sglang.offline.calibrate.criteria import margins
from claa_sglang.offline.calibrate.evidence import Evidence, Kept
from claa_sglang.offline.calibrate.price import Price
from claa_sglang.offline.calibrate.schedule import after, estimated
from claa_sglang.offline.calibrate.studied import Studied
from claa_sglang.offline.calibrate.target import Target

MAX_SCORED = 4  # layers of a set, as in the paper
MAX_SECOND = 2  # the same of a second step: there are as many searches as first steps
BEAM = 4  # sets that are grown
GAIN = 0.002  # of the margin, for which a set grows: more layers cost time, and fit the calibration text more closely


class Candidate(NamedTuple):
    """A schedule, its predicted share of dense prefill time, and what its last step keeps: fp32 [P] each.

    Of the calibration prompts; with two steps an estimate, see `second_steps`.
    """

    steps: tuple[PruneStep, ...]
    share: float
    mass: Tensor
    recall: Tensor

    @property
    def kept(self) -> Kept:
        return Kept(self.mass[None], self.recall[None])

    def __str__(self) -> str:
        return ", then ".join(describe(step) for step in self.steps)


def describe(step: PruneStep) -> str:
    """A step in a line of a table."""
    return f"{step.keep_rate:g} after layer {step.prune_layer}, scored {{{','.join(map(str, step.score_layers))}}}"


class LayerSearch:
    """Finds sets of scored layers on one set of prompts; each set is judged once, whoever asks.

    Args:
        evidence: the prompts.
        target: sets are compared by their margin over it.
        rates: keep rates, in the order of every result.
        max_scored: layers of a set.
    """

    def __init__(
        self, evidence: Evidence, target: Target, rates: Sequence[float], max_scored: int = MAX_SCORED
    ) -> None:
        self._evidence, self._target, self.rates, self._max = evidence, target, tuple(rates), max_scored
        self._margins: dict[tuple[int, ...], Tensor] = {}

    def best(self, layers: range, rate: int) -> tuple[int, ...]:
        """The set of these layers (at least one) with the largest margin at the rate of that index."""

        def margin(scored: tuple[int, ...]) -> float:
            return float(self._margin(scored)[rate])

        singles: list[tuple[int, ...]] = [(layer,) for layer in layers]
        beam = sorted(singles, key=margin, reverse=True)[:BEAM]
        best = beam[0]
        for _ in range(1, self._max):
            grown = {tuple(sorted({*scored, layer})) for scored in beam for layer in layers if layer not in scored}
            if not grown:
                break
            # Sorted first, so that equal margins do not leave the choice to the order of a set.
            beam = sorted(sorted(grown), key=margin, reverse=True)[:BEAM]
            if margin(beam[0]) > margin(best) + GAIN:
                best = beam[0]
        return best

    def kept(self, layers: Sequence[int], rate: int) -> Kept:
        """What this set keeps at the rate of that index: rows [1, P]."""
        return self._evidence.kept(self._evidence.ranking(layers), [self.rates[rate]])

    def _margin(self, scored: tuple[int, ...]) -> Tensor:
        if scored not in self._margins:
            kept = self._evidence.kept(self._evidence.ranking(scored), self.rates)
            self._margins[scored] = margins(kept, self._target)
        return self._margins[scored]


def one_step(
    evidence: Evidence, target: Target, rates: Sequence[float], prune_layers: range, price: Price
) -> Iterator[Candidate]:
    """The best set of scored layers for every prune layer and keep rate, as it is found."""
    search = LayerSearch(evidence, target, rates)
    for prune_layer in prune_layers:
        for index, rate in enumerate(rates):
            scored = search.best(range(prune_layer + 1), index)
            steps = (PruneStep(prune_layer=prune_layer, keep_rate=rate, score_layers=scored),)
            kept = search.kept(scored, index)
            yield Candidate(steps, price.share(steps), kept.mass[0], kept.recall[0])


def second_steps(
    first: Candidate, studied: Studied, target: Target, rates: Sequence[float], prune_layers: range, price: Price
) -> Iterator[Candidate]:
    """The best second step after `first` for every later prune layer in `prune_layers` and every lower keep rate.

    Searched with `schedule.estimated` scores. They are close to what the layers see, but not the same: no schedule is
    chosen before `schedule.seen` has judged it on held-out text.
    """
    step = first.steps[0]
    lower = [rate for rate in rates if rate < step.keep_rate]
    later = range(max(step.prune_layer + 1, prune_layers.start), prune_layers.stop)
    if not lower or not later:
        return
    search = LayerSearch(after(step, studied, later[-1], estimated), target, lower, max_scored=MAX_SECOND)
    for prune_layer in later:
        for index, rate in enumerate(lower):
            scored = search.best(range(step.prune_layer + 1, prune_layer + 1), index)
            steps = (step, PruneStep(prune_layer=prune_layer, keep_rate=rate, score_layers=scored))
            found = search.kept(scored, index)
            yield Candidate(steps, price.share(steps), found.mass[0], found.recall[0])


def frontier(candidates: Sequence[Candidate], quality: Callable[[Candidate], float]) -> list[Candidate]:
    """Candidates that no cheaper one equals in quality, cheapest first."""
    front: list[Candidate] = []
    for one in sorted(candidates, key=lambda c: (c.share, -quality(c))):
        if not front or quality(one) > quality(front[-1]):
            front.append(one)
    return front
