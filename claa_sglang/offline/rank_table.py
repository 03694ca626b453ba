"""A rank report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from claa_sglang.offline.rank_report import Ranked, Report

_TITLES = {"rho": "Spearman's rho", "recall": "recall", "mass": "oracle mass kept"}


def tables(report: Report) -> Iterator[Table]:
    """All rankers by each measure, the sources of text side by side where there are several, and the ablation."""
    where = f"prune after layers {report.first_layer} to {report.last_layer} of {report.layers}"
    count = sum(report.prompts.values())
    low, high = report.tokens
    title = f"{report.model}: {count} prompts of {low} to {high} tokens, keep {report.keep_rate}, {where}"
    yield _by_measure(title, report.rankers, ("rho", "recall", "mass"))
    if report.by_source:
        yield _by_source(report)
    yield _by_measure(
        "CLAA's switches (m, the start of KV compression, is not implemented)", report.ablation, ("mass",)
    )


def _by_measure(title: str, rows: Sequence[Ranked], measures: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("ranker", no_wrap=True)
    for measure in measures:
        for head in (f"{_TITLES[measure]}\nmean ± se", "worst layer", "spread", "half depth"):
            table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = [row.ranker]
        for measure in measures:
            s = row.curves[measure].summary
            cells += [f"{s.mean:.3f} ± {s.standard_error:.3f}", f"{s.worst:.3f} @{s.worst_layer}"]
            cells += [f"{s.spread:.3f}", f"{s.half_depth:.3f}"]
        table.add_row(*cells)
    return table


def _by_source(report: Report) -> Table:
    table = Table(title="Oracle mass kept by source of text: mean ± se, worst layer", title_justify="left")
    table.add_column("ranker", no_wrap=True)
    for source in report.by_source:
        table.add_column(f"{source} ({report.prompts[source]})", justify="right", no_wrap=True)
    for index, row in enumerate(report.rankers):
        summaries = [ranked[index].curves["mass"].summary for ranked in report.by_source.values()]
        cells = [f"{s.mean:.3f} ± {s.standard_error:.3f}, {s.worst:.3f} @{s.worst_layer}" for s in summaries]
        table.add_row(row.ranker, *cells)
    return table
