"""The best ranker and scored layers for every prune layer and keep rate, and for a second prune after them.

A prune layer is itself among the scored ones: with the same layers without it one would prune earlier, and keep as
much. So there is a choice for each last scored layer, and held-out text has others to confirm where it rejects one.

A beam search over sets of layers, with every ranker and set judged once for all rates. All sets are too many (2^20 at
20 layers), and the best set of one size need not hold the best of a smaller one, which is what a beam of several is
for. Rankers that differ in their carry alone are searched once: layers that see an answer see it whatever is carried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from claa_sglang.config.config import PruneStep
from claa_sglang.offline.calibrate.criteria import least_for_most, margins
from claa_sglang.offline.calibrate.evidence import Evidence, Kept
from claa_sglang.offline.calibrate.price import Price
from claa_sglang.offline.calibrate.ranker_list import family
from claa_sglang.offline.calibrate.schedule import after, estimated
from claa_sglang.offline.calibrate.studied import Studied
from claa_sglang.offline.calibrate.target import Target
from claa_sglang.ranking.spec import RankerSpec

MAX_SCORED = 4  # layers of a set, as in the paper
MAX_SECOND = 2  # the same of a second step: there are as many searches as first steps
FIRST_SIZE = 2  # layers of a set up to which every family of rankers is searched; the best ranker's sets grow on
BEAM, LATE_BEAM = 4, 2  # sets that are grown, up to that size and beyond
GAIN = 0.005  # of the value, for which a set grows: more layers cost time, and fit the calibration text more closely
TIE = 0.01  # of the value: choices that keep as much differ in how far from the edge of the budget they keep it


class Candidate(NamedTuple):
    """A ranker and a schedule, its predicted share of dense prefill time, and what its last step keeps ([1, P]).

    Of the calibration prompts; with two steps an estimate, see `second_steps`.
    """

    ranker: RankerSpec
    steps: tuple[PruneStep, ...]
    share: float
    kept: Kept

    @property
    def key(self) -> tuple[RankerSpec, tuple[PruneStep, ...]]:
        """What is chosen, without what it keeps."""
        return self.ranker, self.steps

    def __str__(self) -> str:
        return f"{', then '.join(describe(step) for step in self.steps)}, by {self.ranker}"


def describe(step: PruneStep) -> str:
    """A step in a line of a table."""
    return f"{step.keep_rate:g} after layer {step.prune_layer}, scored {{{','.join(map(str, step.score_layers))}}}"


class Found(NamedTuple):
    """A ranker and the layers it reads."""

    ranker: RankerSpec
    scored: tuple[int, ...]


class LayerSearch:
    """Finds rankers and sets of scored layers on one set of prompts; each pair is judged once, whoever asks.

    Args:
        evidence: the prompts.
        target: pairs are compared by their margin over it.
        rates: keep rates, in the order of every result.
        rankers: at least one; of equally good ones the first wins.
        max_scored: layers of a set.
    """

    def __init__(
        self,
        evidence: Evidence,
        target: Target,
        rates: Sequence[float],
        rankers: Sequence[RankerSpec],
        max_scored: int = MAX_SCORED,
    ) -> None:
        self._evidence, self._target, self.rates, self._max = evidence, target, tuple(rates), max_scored
        self._families: dict[RankerSpec, list[RankerSpec]] = {}
        for one in rankers:
            self._families.setdefault(family(one), []).append(one)
        answers = bool((evidence.total_needed > 0).any())
        self._most = 1 - max(target.recall, target.whole) if answers else float("inf")  # no value is above
        self._judged: dict[Found, tuple[Kept, list[float]]] = {}

    @property
    def judged(self) -> int:
        """How many pairs so far."""
        return len(self._judged)

    def best(self, layers: range, rate: int) -> Found:
        """The ranker and the set of these layers, with the last of them, that is best at the rate of that index."""

        def value(found: Found) -> float:
            return self._value(found)[rate]

        tops = []
        for first, *others in self._families.values():
            top, beam = self._grow([Found(first, (layers[-1],))], layers, FIRST_SIZE, BEAM, value)
            again = [Found(one, found.scored) for one in others for found in (top, *beam)]
            tops.append(max((top, *again), key=value))
        best = max(tops, key=value)
        if len(best.scored) < FIRST_SIZE or self._most - value(best) <= GAIN:  # more layers gain next to nothing
            return best
        grown, _ = self._grow([best], layers, self._max, LATE_BEAM, value)
        return grown

    def kept(self, found: Found, rate: int) -> Kept:
        """What this pair keeps at the rate of that index."""
        self._value(found)
        return self._judged[found][0].row(rate)

    def _grow(
        self, start: list[Found], layers: range, size: int, width: int, value: Callable[[Found], float]
    ) -> tuple[Found, list[Found]]:
        """The best of sets grown from `start`, of one size, to `size`; and the last beam."""
        # Sorted first, so that equal values do not leave the choice to the order of a set.
        beam = sorted(start, key=value, reverse=True)[:width]
        best = beam[0]
        for _ in range(len(best.scored), min(size, self._max)):
            grown = {
                Found(one.ranker, tuple(sorted({*one.scored, layer})))
                for one in beam
                for layer in layers
                if layer not in one.scored
            }
            if not grown:
                break
            beam = sorted(sorted(grown, key=lambda one: one.scored), key=value, reverse=True)[:width]
            if value(beam[0]) > value(best) + GAIN:
                best = beam[0]
        return best, beam

    def _value(self, found: Found) -> list[float]:
        if found not in self._judged:
            kept = self._evidence.kept(self._evidence.ranking(found.ranker, found.scored), self.rates)
            edge = TIE * least_for_most(kept, self._target.whole)
            self._judged[found] = kept, (margins(kept, self._target) - edge).tolist()
        return self._judged[found][1]


def one_step(
    evidence: Evidence,
    target: Target,
    rates: Sequence[float],
    prune_layers: range,
    price: Price,
    rankers: Sequence[RankerSpec],
) -> Iterator[Candidate]:
    """The best ranker and set of scored layers for every prune layer and keep rate, as it is found."""
    search = LayerSearch(evidence, target, rates, rankers)
    for prune_layer in prune_layers:
        for index, rate in enumerate(rates):
            found = search.best(range(prune_layer + 1), index)
            steps = (PruneStep(prune_layer=prune_layer, keep_rate=rate, score_layers=found.scored),)
            yield Candidate(found.ranker, steps, price.share(steps), search.kept(found, index))


def second_steps(
    first: Candidate, studied: Studied, target: Target, rates: Sequence[float], prune_layers: range, price: Price
) -> Iterator[Candidate]:
    """The best second step after `first` for every later prune layer in `prune_layers` and every lower keep rate.

    By the ranker of the first, as a server has one. None after a first step that misses the target itself: what it lost
    no later step brings back. Searched with `schedule.estimated` scores. They are close to what the layers see, but not
    the same: no schedule is chosen before `schedule.seen` has judged it on held-out text.
    """
    step = first.steps[0]
    lower = [rate for rate in rates if rate < step.keep_rate]
    later = range(max(step.prune_layer + 1, prune_layers.start), prune_layers.stop)
    if not lower or not later or float(margins(first.kept, target)[0]) < 0:
        return
    left = after(step, first.ranker, studied, later[-1], estimated)
    search = LayerSearch(left, target, lower, [first.ranker], max_scored=MAX_SECOND)
    for prune_layer in later:
        for index, rate in enumerate(lower):
            found = search.best(range(step.prune_layer + 1, prune_layer + 1), index)
            steps = (step, PruneStep(prune_layer=prune_layer, keep_rate=rate, score_layers=found.scored))
            yield Candidate(first.ranker, steps, price.share(steps), search.kept(found, index))


def frontier(candidates: Sequence[Candidate], quality: Callable[[Candidate], float]) -> list[Candidate]:
    """Candidates that no cheaper one equals in quality, cheapest first."""
    front: list[Candidate] = []
    for one in sorted(candidates, key=lambda c: (c.share, -quality(c))):
        if not front or quality(one) > quality(front[-1]):
            front.append(one)
    return front
