"""From studied prompts to a confirmed choice: search, judge, report. Only a second step needs the model again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from tqdm import tqdm

from claa_sglang.offline.calibrate import report
from claa_sglang.offline.calibrate.default import default_choice, rivals
from claa_sglang.offline.calibrate.evidence import Kept, together
from claa_sglang.offline.calibrate.held_out import Verdict, promising, require_one, verdicts
from claa_sglang.offline.calibrate.price import Price
from claa_sglang.offline.calibrate.schedule import SecondScores, estimated, kept_by
from claa_sglang.offline.calibrate.search import Candidate, one_step, second_steps
from claa_sglang.offline.calibrate.studied import Studied
from claa_sglang.offline.calibrate.target import Target
from claa_sglang.offline.calibrate.threads import one_thread
from claa_sglang.ranking.spec import RankerSpec


class Question(NamedTuple):
    """What is to be chosen. steps: prunes at most, 1 or 2."""

    target: Target
    rankers: tuple[RankerSpec, ...]
    rates: tuple[float, ...]
    prune_layers: range
    price: Price
    steps: int = 1


def choose(
    question: Question, calibrated: Studied, held_out: Sequence[Studied], seen: SecondScores, console: Console
) -> Verdict:
    """The cheapest choice made on `calibrated` that every set of `held_out` confirms; prints what it was chosen from.

    seen: see `schedule.seen`. Raises CalibrationError if there is none.
    """
    target, price = question.target, question.price
    with one_thread():
        one, two = _search(question, calibrated)
    asked: dict[object, Kept] = {}

    def on_held_out(candidate: Candidate) -> Kept:
        if candidate.key not in asked:
            judged = [kept_by(candidate.steps, candidate.ranker, part, estimated) for part in held_out]
            asked[candidate.key] = together(judged)
        return asked[candidate.key]

    names = "+".join(part.name for part in held_out)
    with one_thread():
        for candidate in tqdm(one, unit="choice", desc="held-out text"):
            on_held_out(candidate)
    console.print(report.grid(f"chosen on {calibrated.name}", one, lambda candidate: candidate.kept, target))
    console.print(report.grid(f"the same on held-out {names}", one, on_held_out, target))
    default = default_choice(calibrated.evidence, price)
    console.print(report.against_default(default, rivals(default, [*one, *two], target), on_held_out))
    if two:
        console.print(report.steps_at_equal_cost(one, two, on_held_out, target))

    def judge(candidate: Candidate) -> dict[str, Kept]:
        return {part.name: kept_by(candidate.steps, candidate.ranker, part, seen) for part in held_out}

    good = promising([*one, *two], target)
    tried = []
    for verdict in verdicts(good, judge, target):
        report.say(console, verdict)
        tried.append(verdict)
    title = f"chosen from (TTFT at {price.tokens:,} tokens, dense = 1)"
    console.print(report.choices(title, report.worth_showing(good, tried, target), tried))
    return require_one(tried, calibrated.name)


def _search(question: Question, calibrated: Studied) -> tuple[list[Candidate], list[Candidate]]:
    """All choices of one step, and of two if asked for."""
    target, rates, prune_layers, price = question.target, question.rates, question.prune_layers, question.price
    found = one_step(calibrated.evidence, target, rates, prune_layers, price, question.rankers)
    one = list(tqdm(found, total=len(rates) * len(prune_layers), unit="choice", desc="one step"))
    two: list[Candidate] = []
    if question.steps > 1:
        for candidate in tqdm(one, unit="first step", desc="two steps"):
            two += second_steps(candidate, calibrated, target, rates, prune_layers, price)
    return one, two
