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
    names = ("ranker", "layers", "n", *(f"{rate:g}" for rate in keep_rates), "median", "p90", "max")
    table = _table(f"{title}: share of whole answers at a keep rate, and the keep rate they take", names)
    for row in rows:
        table.add_row(row.ranker, _listed(row.layers), str(row.n), *_numbers((*row.whole, *row.minimal)))
    return table


def _by_task(title: str, rows: Sequence[Row]) -> Table:
    names = ("task", "ranker", "n", "median", "p90", "max")
    table = _table(f"{title}: the keep rate that whole answers take", names)
    for task in dict.fromkeys(row.task for row in rows if row.task != ALL):
        table.add_section()
        for row in rows:
            if row.task == task:
                table.add_row(task, row.ranker, str(row.n), *_numbers(row.minimal))
    return table


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in names:
        text = name in ("task", "ranker", "layers")
        table.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    return table


def _numbers(values: Sequence[float]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
