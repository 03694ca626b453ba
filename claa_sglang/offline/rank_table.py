"""A rank report as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from claa_sglang.offline.differences import Difference, Interval
from claa_sglang.offline.rank_report import Ranked, Report

_TITLES = {
    "rho": "Spearman's rho with the oracle",
    "recall": "Recall of the oracle's tokens at the budget",
    "mass": "Oracle mass kept",
}


def heading(report: Report) -> str:
    """What all tables are about, in a line or two."""
    low, high = report.tokens
    return (
        f"{report.model}: {sum(report.prompts.values())} prompts of {low} to {high} tokens, keep {report.keep_rate}; "
        f"prune after layer {report.first_layer} to {report.last_layer} of {report.layers}"
    )


def tables(report: Report) -> Iterator[Table]:
    """All rankers by each measure, the sources of text side by side where there are several, and the ablation."""
    for measure, title in _TITLES.items():
        yield _over_layers(title, report.rankers, measure)
    if report.by_source:
        yield _by_source(report)
    yield _over_layers(
        "Oracle mass kept by CLAA's variants (m, the start of KV compression, is not\nimplemented)",
        report.ablation,
        "mass",
    )
    for title, rows in (
        ("Oracle mass, CLAA minus other rankers", report.differences),
        ("Oracle mass, CLAA minus itself with one thing changed", report.effects),
    ):
        if rows:
            yield _paired(title, rows)


def _over_layers(title: str, rows: Sequence[Ranked], measure: str) -> Table:
    table = _table(title)
    for head in ("mean ± se", "worst layer", "spread", "half depth"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        s = row.curves[measure].summary
        cells = [f"{s.mean:.3f} ± {s.standard_error:.3f}", f"{s.worst:.3f} @{s.worst_layer}"]
        table.add_row(row.ranker, *cells, f"{s.spread:.3f}", f"{s.half_depth:.3f}")
    return table


def _paired(title: str, rows: Sequence[Difference]) -> Table:
    table = _table(f"{title}: paired over prompts, 95 % intervals")
    for head in ("mean over layers", "worst layer", "gap closed"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        gap = "-" if row.gap_closed is None else _interval(row.gap_closed, ".2f")
        table.add_row(row.other, _interval(row.mean, "+.3f"), _interval(row.worst, "+.3f"), gap)
    return table


def _interval(value: Interval, spec: str) -> str:
    return f"{value.mean:{spec}} [{value.low:{spec}}, {value.high:{spec}}]"


def _by_source(report: Report) -> Table:
    table = _table("Oracle mass kept by source of text: mean ± se, worst layer")
    for source in report.by_source:
        table.add_column(f"{source} ({report.prompts[source]})", justify="right", no_wrap=True)
    for index, row in enumerate(report.rankers):
        summaries = [ranked[index].curves["mass"].summary for ranked in report.by_source.values()]
        cells = [f"{s.mean:.3f} ± {s.standard_error:.3f}, {s.worst:.3f} @{s.worst_layer}" for s in summaries]
        table.add_row(row.ranker, *cells)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("ranker", no_wrap=True)
    return table
