"""Tables of what a calibration chose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from claa_sglang.offline.calibrate.criteria import LowerBound, Measured, margins, measured_all
from claa_sglang.offline.calibrate.default import Rival
from claa_sglang.offline.calibrate.evidence import Kept
from claa_sglang.offline.calibrate.held_out import Verdict, margin
from claa_sglang.offline.calibrate.search import Candidate, frontier
from claa_sglang.offline.calibrate.target import Target
from claa_sglang.offline.differences import paired

SHARES = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)

Judge = Callable[[Candidate], Kept]


def grid(title: str, candidates: Sequence[Candidate], kept: Judge, target: Target) -> Table:
    """One-step choices: prune layers down, keep rates across; means of the criteria, green where all suffice."""
    rates = sorted({one.steps[0].keep_rate for one in candidates})
    by_place = {(one.steps[0].prune_layer, one.steps[0].keep_rate): one for one in candidates}
    table = Table(title=f"{title}, in percent: oracle mass/answer tokens/whole answers", title_justify="left")
    table.add_column("prune layer, keep rate", justify="right")
    for rate in rates:
        table.add_column(f"{rate:g}", justify="right")
    for layer in sorted({layer for layer, _ in by_place}):
        cells = []
        for rate in rates:
            found = kept(by_place[layer, rate])
            cell = "/".join(f"{100 * float(one.nanmean()):.0f}" for one in (found.mass, found.recall, found.whole))
            cells.append(f"[green]{cell}[/green]" if float(margins(found, target)[0]) >= 0 else cell)
        table.add_row(str(layer), *cells)
    return table


def worth_showing(good: Sequence[Candidate], verdicts: Sequence[Verdict], target: Target) -> list[Candidate]:
    """Of the choices that `held_out.promising` found: the frontier of all layers, and those that were judged."""
    front = frontier(good, lambda one: margin(one, target))
    shown = {one.key for one in front} | {verdict.candidate.key for verdict in verdicts}
    return [one for one in good if one.key in shown]


def choices(title: str, front: Sequence[Candidate], verdicts: Sequence[Verdict]) -> Table:
    """What was chosen from, cheapest first, and what held-out text said of those it was asked about."""
    said = {verdict.candidate.key: verdict for verdict in verdicts}
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("predicted TTFT", "choice", "oracle mass", "answer tokens", "whole answers", "on held-out text"):
        table.add_column(column, overflow="fold")
    for one, on_calibration in zip(front, measured_all([one.kept for one in front]), strict=True):
        verdict = said.get(one.key)
        table.add_row(
            f"{one.share:.3f}",
            str(one),
            lower_bound(on_calibration.mass),
            lower_bound(on_calibration.recall),
            lower_bound(on_calibration.whole),
            "not asked" if verdict is None else _verdict(verdict),
        )
    return table


def steps_at_equal_cost(
    one_step: Sequence[Candidate], two_steps: Sequence[Candidate], kept: Judge, target: Target
) -> Table:
    """For each share of dense time the best choice (on the calibration text) within it, and what it keeps of `kept`."""
    table = Table(title="one step against two at equal cost: mass / answer tokens / whole", title_justify="left")
    for column in ("predicted TTFT at most", "one step", "held out", "two steps (estimated)", "held out"):
        table.add_column(column, overflow="fold")
    for share in SHARES:
        cells = []
        for candidates in (one_step, two_steps):
            affordable = [one for one in candidates if one.share <= share]
            if not affordable:
                cells += ["none", ""]
                continue
            best = max(affordable, key=lambda one: margin(one, target))
            cells += [f"{best}: {_means(best.kept)}", _means(kept(best))]
        table.add_row(f"{share:.2f}", *cells)
    return table


def against_default(default: Candidate, rivals: Sequence[Rival], kept: Judge) -> Table:
    """What choices gain over the default on held-out text, as paired differences with 95 % intervals."""
    table = Table(title="against the default, on held-out text", title_justify="left", show_lines=True)
    for column in ("", "choice", "predicted TTFT", "oracle mass", "answer tokens", "whole answers"):
        table.add_column(column, overflow="fold")
    before = kept(default)
    table.add_row("default", str(default), f"{default.share:.3f}", *_means(before).split(" / "))
    for rival in rivals:
        after = kept(rival.choice)
        cells = [
            f"{float(now.nanmean()):.2f} ({gain(now[0], then[0])})"
            for now, then in zip(after[:3], before[:3], strict=True)
        ]
        table.add_row(rival.why, str(rival.choice), f"{rival.choice.share:.3f}", *cells)
    return table


def gain(now: Tensor, then: Tensor) -> str:
    """fp32 [P] each; prompts of which it is not known are left out."""
    change = (now - then).double().numpy()
    known = change[~np.isnan(change)]
    if known.size < 2:
        return "not known"
    found = paired(known)
    return f"{found.mean:+.2f} ± {found.high - found.mean:.2f}"


def say(console: Console, verdict: Verdict) -> None:
    """A rejection, loudly, or the choice."""
    if verdict.misses:
        misses = "; ".join(f"{source}: {missed}" for source, missed in verdict.misses.items())
        console.print(f"[bold red]REJECTED[/bold red] {verdict.candidate}: does not carry over to {misses}")
    else:
        console.print(f"[bold green]carries over[/bold green] {verdict.candidate}")


def lower_bound(one: LowerBound) -> str:
    return f"{one.mean:.3f} (≥ {one.low:.3f})" if one.prompts else "none known"


def _means(kept: Kept) -> str:
    return " / ".join(f"{float(one.nanmean()):.2f}" for one in (kept.mass, kept.recall, kept.whole))


def _verdict(verdict: Verdict) -> str:
    def line(source: str, one: Measured) -> str:
        whole = f"{one.whole.mean:.3f} whole" if one.whole.prompts else "whole answers not known"
        return f"{source}: {lower_bound(one.mass)}, {lower_bound(one.recall)}, {whole}"

    lines = [line(source, one) for source, one in verdict.measured.items()]
    said = "[red]rejected[/red]" if verdict.misses else "[green]chosen[/green]"
    return "\n".join([said, *lines, f"whole, all of it: {lower_bound(verdict.whole)}"])
