"""Results on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.quality.kept import KeptSets
from benchmarks.quality.settings import DENSE_NAME
from benchmarks.quality.statistics import ALL, EVERY_LENGTH, Cell
from benchmarks.quality.timing import Ttft
from benchmarks.quality.verdicts import judged, verdict
from claa_sglang.offline.interval import Interval

SHORT = {"within 1 point": "ok", "interval has 0": "~", "worse": "WORSE"}


def show(cells: Sequence[Cell], times: Sequence[Ttft], kept: Sequence[KeptSets]) -> None:
    """A table of accuracies per ranker, verdicts, what happened to the answers, and what else was measured."""
    console = Console()
    rankers = list(dict.fromkeys(cell.ranker for cell in cells if cell.ranker != DENSE_NAME))
    for ranker in rankers:
        console.print(_accuracy(ranker, cells))
    for ranker in rankers:
        console.print(_verdicts(ranker, cells))
    if any(cell.turn > 1 for cell in cells):
        console.print(_turns(cells))
    if len(rankers) > 1:
        console.print(_leads(cells, rankers[0]))
    console.print(_answers(cells))
    if kept:
        console.print(_kept(kept))
    if times:
        console.print(_times(times))


def _accuracy(ranker: str, cells: Sequence[Cell]) -> Table:
    rates = sorted({cell.keep_rate for cell in cells if cell.ranker == ranker})
    title = f"{ranker}: accuracy in %, and its difference to dense with a 95 % interval, in points"
    forms = ["form"] if any(cell.form != ALL for cell in cells) else []
    columns = "turn", "task", "source", *forms, "tokens", "n", "dense", *(f"keep {rate:g}" for rate in rates)
    table = Table(*columns, title=title)
    found = {(c.turn, c.task, c.source, c.form, c.length, c.ranker, c.keep_rate): c for c in cells}
    for cell in cells:
        if cell.ranker != DENSE_NAME or (cell.task == ALL) != (cell.source == ALL):
            continue
        where = cell.turn, cell.task, cell.source, cell.form, cell.length
        pruned = [found[*where, ranker, rate] for rate in rates]
        shown = [f"{_percent(one.accuracy.mean)}  {_points(one)}" for one in pruned]
        form = [cell.form] if forms else []
        named = str(cell.turn), cell.task, cell.source, *form, _length(cell), str(cell.n)
        table.add_row(*named, _percent(cell.accuracy.mean), *shown)
    return table


def _verdicts(ranker: str, cells: Sequence[Cell]) -> Table:
    mine = [cell for cell in judged(cells) if cell.ranker == ranker]
    rates = sorted({cell.keep_rate for cell in mine})
    title = f"{ranker}: points to dense. ok: within 1 point, ~: 0 is in its interval, WORSE: neither"
    table = Table("tokens", "turn", "task", "n", *(f"keep {rate:g}" for rate in rates), title=title)
    found = {(c.length, c.turn, c.task, c.keep_rate): c for c in mine}
    for length, turn, task, n in sorted({(c.length, c.turn, c.task, c.n) for c in mine}):
        pruned = [found[length, turn, task, rate] for rate in rates]
        table.add_row(str(length), str(turn), task, str(n), *(_verdict(one) for one in pruned))
    return table


def _verdict(cell: Cell) -> str:
    assert cell.to_dense is not None
    return f"{100 * cell.to_dense.difference.mean:+.1f} {SHORT[verdict(cell)]}"


def _turns(cells: Sequence[Cell]) -> Table:
    title = "tokens of each turn's prompt: medians over all tasks"
    table = Table("tokens", "ranker", "keep", "turn", "n", "prompt", "early cached", "late computed", title=title)
    for cell in sorted(cells, key=lambda c: (c.length, c.ranker, c.keep_rate, c.turn)):
        if cell.task == cell.source == cell.form == ALL and cell.length != EVERY_LENGTH and cell.tokens is not None:
            late = "" if cell.tokens.late_computed is None else f"{cell.tokens.late_computed:g}"
            counts = f"{cell.tokens.prompt:g}", f"{cell.tokens.early_cached:g}", late
            table.add_row(_length(cell), cell.ranker, f"{cell.keep_rate:g}", str(cell.turn), str(cell.n), *counts)
    return table


def _kept(found: Sequence[KeptSets]) -> Table:
    title = "kept tokens that differ between a cold prompt and one with a prefix hit"
    columns = "tokens", "ranker", "keep", "hit", "prompts", "cached", "kept", "differ: median", "most"
    table = Table(*columns, "same answer", "same grade", title=title)
    for one in found:
        counts = (f"{x:g}" for x in (one.prompts, one.cached, one.kept, one.median, one.most))
        same = str(one.same_text), str(one.same_grade)
        table.add_row(str(one.length), one.ranker, f"{one.keep_rate:g}", one.hit, *counts, *same)
    return table


def _leads(cells: Sequence[Cell], first: str) -> Table:
    table = Table("ranker", "keep", "task", "tokens", "n", "points", title=f"accuracy of {first}, less the ranker's")
    lengths = {cell.length for cell in cells}
    total = EVERY_LENGTH if EVERY_LENGTH in lengths else max(lengths)
    for cell in cells:
        if cell.lead is not None and cell.source == cell.form == ALL and (cell.length, cell.turn) == (total, 1):
            shown = cell.ranker, f"{cell.keep_rate:g}", cell.task, _length(cell), str(cell.n)
            table.add_row(*shown, _interval(cell.lead))
    return table


def _answers(cells: Sequence[Cell]) -> Table:
    table = Table(
        *("ranker", "keep", "tokens", "turn", "n", "only dense right", "only pruned right", "p", "same answer, %"),
        "KL of the first token, nats (lower bound)",
        title="beside dense, over all tasks and sources",
    )
    for cell in cells:
        beside = cell.to_dense
        if cell.task == cell.source == cell.form == ALL and beside is not None:
            kl = f"{_range(beside.first_token_kl)}, n = {beside.first_token_n}" if beside.first_token_kl else ""
            table.add_row(
                *(cell.ranker, f"{cell.keep_rate:g}", _length(cell), str(cell.turn), str(cell.n)),
                *(str(beside.only_dense), str(beside.only_pruned), f"{beside.p_value:.2g}"),
                *(_percent(beside.agreement.mean), kl),
            )
    return table


def _times(times: Sequence[Ttft]) -> Table:
    title = "TTFT, one request at a time, nothing cached"
    table = Table("tokens", "ranker", "keep", "median ms", "min", "max", "of dense", "of stock", title=title)
    for one in times:
        low, high = min(one.seconds), max(one.seconds)
        shown = (f"{1000 * x:.1f}" for x in (one.median, low, high))
        stock = one.to_stock
        of_stock = f"{stock.median:.3f} [{stock.least:.3f}, {stock.most:.3f}]" if stock else ""
        table.add_row(str(one.length), one.ranker, f"{one.keep_rate:g}", *shown, f"{one.ratio:.3f}", of_stock)
    return table


def _length(cell: Cell) -> str:
    return "all" if cell.length == EVERY_LENGTH else str(cell.length)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(cell: Cell) -> str:
    assert cell.to_dense is not None
    return _interval(cell.to_dense.difference)


def _interval(found: Interval) -> str:
    return f"{100 * found.mean:+.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _range(found: Interval | None) -> str:
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]" if found else ""
