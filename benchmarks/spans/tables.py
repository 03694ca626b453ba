"""Results of benchmarks.span_study on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.spans.counting import ALL, Row


def show(rows: Sequence[Row], keep_rates: Sequence[float]) -> None:
    """For each form and length how often answers are whole, and for each task the keep rates that this takes."""
    console = Console()
    for form, length in dict.fromkeys((row.form, row.length) for row in rows):
        some = [row for row in rows if (row.form, row.length) == (form, length)]
        console.print(_whole(f"{form}, {length} tokens", [row for row in some if row.task == ALL], keep_rates))
        for layers in dict.fromkeys(tuple(row.layers) for row in some):
            chosen = [row for row in some if tuple(row.layers) == layers]
            console.print(_by_task(f"{form}, {length} tokens, layers {_listed(layers)}", chosen))


def _whole(title: str, rows: Sequence[Row], keep_rates: Sequence[float]) -> Table:
    table = Table(title=f"{title}: share of whole answers at a keep rate, and the keep rate they take")
    for name in ("ranker", "layers", "n", *(f"{rate:g}" for rate in keep_rates), "median", "p90", "max"):
        table.add_column(name, justify="left" if name in ("ranker", "layers") else "right")
    for row in rows:
        numbers = (f"{value:.2f}" for value in (*row.whole, *row.minimal))
        table.add_row(row.ranker, _listed(row.layers), str(row.n), *numbers)
    return table


def _by_task(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{title}: median, p90 and maximum of the keep rate that a whole answer takes")
    rankers = list(dict.fromkeys(row.ranker for row in rows))
    for name in ("task", "n", *rankers):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task in dict.fromkeys(row.task for row in rows):
        found = {row.ranker: row for row in rows if row.task == task}
        cells = (" ".join(f"{value:.2f}" for value in found[ranker].minimal) for ranker in rankers)
        table.add_row(task, str(found[rankers[0]].n), *cells)
    return table


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
