"""A rank report as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from claa_sglang.offline.differences import Difference
from claa_sglang.offline.interval import Interval
from claa_sglang.offline.rank_report import Ranked, Report

_TITLES = {
    "rho": "Spearman's rho with the oracle",
    "recall": "Recall of the oracle's tokens at the budget",
    "mass": "Oracle mass kept",
    "answer": "Tokens kept that the right answer repeats",
}


def heading(report: Report) -> str:
    """What all tables are about, in a line or two."""
    low, high = report.tokens
    return (
        f"{report.model}: {sum(report.prompts.values())} prompts of {low} to {high} tokens, keep {report.keep_rate}; "
        f"prune after layer {report.first_layer} to {report.last_layer} of {report.layers} "
        "(step: mean change from one to the next; half: at half depth)"
    )


def tables(report: Report) -> Iterator[Table]:
    """All rankers by each measure, the sources of text side by side where there are several, and the ablation."""
    for measure, title in _TITLES.items():
        if curve := report.rankers[0].curves.get(measure):
            whole = curve.prompts == sum(report.prompts.values())
            yield _over_layers(title if whole else f"{title} ({curve.prompts} prompts)", report.rankers, measure)
    if report.by_source:
        yield _by_source(report)
    yield _over_layers(
        "Oracle mass kept by CLAA's variants (m, the start of KV compression, is not\nimplemented)",
        report.ablation,
        "mass",
    )
    for title, rows in (("other rankers", report.differences), ("itself with one thing changed", report.effects)):
        for measure in dict.fromkeys(row.measure for row in rows):
            named = [row for row in rows if row.measure == measure]
            yield _paired(f"{_TITLES[measure]}: CLAA minus {title}", named)


def _over_layers(title: str, rows: Sequence[Ranked], measure: str) -> Table:
    table = _table(title)
    for head in ("mean ± se", "worst", "spread", "step", "half"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        s = row.curves[measure].summary
        cells = [f"{s.mean:.3f} ± {s.standard_error:.3f}", f"{s.worst:.3f} @{s.worst_layer}"]
        table.add_row(row.ranker, *cells, f"{s.spread:.3f}", f"{s.step:.3f}", f"{s.half_depth:.3f}")
    return table


def _paired(title: str, rows: Sequence[Difference]) -> Table:
    table = _table(f"{title} (95 %, paired)")
    for head in ("mean over layers", "worst layer", "gap closed"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        gap = row.gap_closed
        closed = "-" if gap is None else f"{gap.mean:.2f} [{gap.low:.2f}, {gap.high:.2f}]"
        table.add_row(row.other, _symmetric(row.mean), _symmetric(row.worst), closed)
    return table


def _symmetric(value: Interval) -> str:
    return f"{value.mean:+.3f} ± {value.high - value.mean:.3f}"


def _by_source(report: Report) -> Table:
    table = _table("Oracle mass kept by source of text: mean / worst layer")
    for source in report.by_source:
        table.add_column(f"{source} ({report.prompts[source]})", justify="right", no_wrap=True)
    for index, row in enumerate(report.rankers):
        summaries = [ranked[index].curves["mass"].summary for ranked in report.by_source.values()]
        cells = [f"{s.mean:.3f} / {s.worst:.3f}" for s in summaries]
        table.add_row(row.ranker, *cells)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("ranker", no_wrap=True)
    return table
