"""From raw samples to claims, and the table of them. Everything claimed is computed here, from a record alone.

A ratio is taken within each round, where both sides served the same prompt a moment apart, and its median is claimed.
So a slow phase of the machine changes both sides of a ratio, not the ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.ttft import targets, variants
from benchmarks.ttft.bound import Depth, bound_seconds, late_seconds, step_bytes
from benchmarks.ttft.record import Record, Series
from benchmarks.ttft.settings import DECODE_TOKENS

SECOND_TURN = 1.1  # times late(kN) a second turn may take on top of stock's own
_HELPERS = ("late layers", "one layer")  # variants that only serve a bound


class Row(msgspec.Struct, kw_only=True):
    """One line of the table. Times in seconds; ratios are medians of the ratios within rounds.

    bound: early(N) + late(kN), or what the target of a second turn allows. plain_sum: with what a request pays once
    counted twice. step_bytes, bandwidth_share: of a decoding step; the share is of what the memory can move. verdicts:
    per kind of target ("of stock", ...), (range in words, whether it was met).
    """

    scenario: str
    tokens: int
    chunk: int
    quantity: str
    variant: str
    count: int
    median: float
    low: float
    high: float
    of_stock: float | None = None
    bound: float | None = None
    of_bound: float | None = None
    plain_sum: float | None = None
    step_bytes: float | None = None
    bandwidth_share: float | None = None
    verdicts: dict[str, tuple[str, bool]] = {}


def rows(record: Record) -> list[Row]:
    """All lines, in the order in which things were measured. Requests at a rate are not among them."""
    return [
        _row(record, series)
        for series in record.series
        if series.samples and series.rate is None and not series.variant.startswith(_HELPERS)
    ]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Ratio within each round that both have: a run that was cut short between engines leaves one series longer."""
    return [a / b for a, b in zip(over, under, strict=False)]


def _row(record: Record, series: Series) -> Row:
    values = series.samples
    row = Row(
        scenario=series.scenario,
        tokens=series.tokens,
        chunk=series.chunk,
        quantity=series.quantity,
        variant=series.variant,
        count=len(values),
        median=statistics.median(values),
        low=min(values),
        high=max(values),
    )
    rate = keep_rate(series.variant)
    stock = _sibling(record, series, variants.STOCK)
    if series.variant != variants.STOCK and stock and series.quantity != variants.PRUNED_TURNS:
        row.of_stock = statistics.median(ratios(values, stock))
    if rate is not None and (bound := bounds(record, series, rate)):
        row.bound = statistics.median(bound)
        row.of_bound = statistics.median(ratios(values, bound))
    if series.scenario == "cold" and rate is not None:
        early, late = (_sibling(record, series, name) for name in (variants.EARLY, variants.late(rate)))
        sums = [a + b for a, b in zip(early, late, strict=False)]
        row.plain_sum = statistics.median(sums) if sums else None
    if series.scenario == "decode":
        depth = Depth(record.shape["num_hidden_layers"], record.prune_layer)
        batch = record.settings["decode_batch"]
        row.step_bytes = step_bytes(
            record.shape, record.itemsize, batch, series.tokens, DECODE_TOKENS / 2, depth, 1.0 if rate is None else rate
        )
        row.bandwidth_share = row.step_bytes / row.median / record.bandwidth if record.bandwidth else None
    if record.model == targets.SHAPE:
        row.verdicts = _verdicts(row, statistics.median(stock) if stock else None)
    return row


def bounds(record: Record, series: Series, rate: float) -> list[float]:
    """What a pruned request is held against, per round; [] where nothing was measured for it.

    cold: early(N) + late(kN). second-turn: 1.1 late(kN) + stock's own second turn.
    """
    depth = Depth(record.shape["num_hidden_layers"], record.prune_layer)
    late = list(
        zip(
            _sibling(record, series, variants.late(rate)),
            _sibling(record, series, variants.one(rate)),
            strict=False,
        )
    )
    if series.scenario == "cold":
        early = _sibling(record, series, variants.EARLY)
        return [bound_seconds(e, *pair, depth.late) for e, pair in zip(early, late, strict=False)]
    if series.scenario == "second-turn":
        stock = _sibling(record, series, variants.STOCK)
        return [s + SECOND_TURN * late_seconds(*pair, depth.late) for s, pair in zip(stock, late, strict=False)]
    return []


def keep_rate(variant: str) -> float | None:
    """The keep rate that a variant's name says, None for one that prunes nothing."""
    return float(variant.split()[1].rstrip(",")) if variant.startswith("keep ") else None


def _sibling(record: Record, series: Series, variant: str) -> list[float]:
    """Samples of the same thing for another variant, [] if there are none."""
    for other in record.series:
        same = all(
            getattr(other, name) == getattr(series, name)
            for name in ("scenario", "tokens", "chunk", "quantity", "rate")
        )
        if same and other.variant == variant:
            return other.samples
    return []


def _verdicts(row: Row, stock: float | None) -> dict[str, tuple[str, bool]]:
    values = {
        targets.OF_STOCK: row.of_stock,
        targets.OF_BOUND: row.of_bound,
        targets.SECONDS: None if stock is None else row.median - stock,
    }
    found: dict[str, tuple[str, bool]] = {}
    for kind, value in values.items():
        target = targets.find(row.scenario, row.tokens, row.quantity, row.variant, kind)
        if target and value is not None:
            found[kind] = (target.text, target.met(value))
    return found


# --- the tables ---


def print_record(record: Record, console: Console | None = None) -> None:
    """One table per scenario, and what it was measured on and with."""
    console = console or Console(width=max(120, Console().width))
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    console.print(f"[bold]{record.model}[/], prune layer {record.prune_layer} of {record.shape['num_hidden_layers']}")
    console.print(f"{record.device}; {versions}; {record.date}", highlight=False)
    lines = rows(record)
    for scenario in dict.fromkeys(line.scenario for line in lines):
        console.print(_times(scenario, [line for line in lines if line.scenario == scenario]))
    if any(line.step_bytes for line in lines):
        console.print(_steps(lines))
    if any(series.rate is not None for series in record.series):
        console.print(_rates(record))
    if lines:
        console.print("ratios: medians of the ratios within rounds", highlight=False)
    for engine in record.engines:
        took = f"{engine['name']} {engine['seconds']:.0f} s"
        console.print(f"engine start: {took}, {engine['attention_backend']}", highlight=False)
    if "startup_seconds" in record.claa:
        console.print(f"plugin's own time at start: {record.claa['startup_seconds']:.2f} s", highlight=False)
    for error in record.errors:
        console.print(f"[red]failed:[/] {escape(error)}", highlight=False)
    if record.stopped:
        console.print(f"[yellow]incomplete: {record.stopped}")


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "tokens": lambda row: f"{row.tokens:,}",
    "chunk": lambda row: f"{row.chunk:,}",
    "what": lambda row: row.quantity,
    "who": lambda row: row.variant,
    "rounds": lambda row: str(row.count),
    "median ms": lambda row: _value(row, row.median),
    "min to max": lambda row: f"{_value(row, row.low)} to {_value(row, row.high)}",
    "of stock": lambda row: _ratio(row.of_stock),
    "bound": lambda row: milliseconds(row.bound),
    "plain sum": lambda row: milliseconds(row.plain_sum),
    "of bound": lambda row: _ratio(row.of_bound),
    "target": lambda row: "; ".join(_verdict(kind, *verdict) for kind, verdict in row.verdicts.items()),
}
_CAPTIONS = {
    "cold": "bound: early(N) + late(kN); plain sum: the same with what a request pays once counted twice",
    "second-turn": f"bound: stock's own second turn + {SECOND_TURN} late(kN)",
}


def _times(scenario: str, lines: list[Row]) -> Table:
    """Columns in which nothing stands are left out."""
    table = Table(title=scenario, caption=_CAPTIONS.get(scenario), title_justify="left", caption_justify="left")
    columns = {name: [show(line) for line in lines] for name, show in _COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    for name in columns:
        table.add_column(name, justify="left" if name in ("what", "who", "target") else "right")
    for index, cells in enumerate(zip(*columns.values(), strict=True)):
        last = lines[index + 1 : index + 2]
        table.add_row(*cells, end_section=bool(last) and last[0].tokens != lines[index].tokens)
    return table


def _steps(lines: list[Row]) -> Table:
    table = Table(
        "tokens",
        "who",
        "GB read per step",
        "TB/s",
        "of the memory's peak",
        title="decode: one step",
        title_justify="left",
    )
    for line in lines:
        if line.step_bytes:
            share = "" if line.bandwidth_share is None else f"{line.bandwidth_share:.0%}"
            speed = line.step_bytes / line.median
            table.add_row(
                f"{line.tokens:,}", line.variant, f"{line.step_bytes / 1e9:.2f}", f"{speed / 1e12:.3f}", share
            )
    return table


def _rates(record: Record) -> Table:
    title = "rates: TTFT of requests that arrive at random (sglang.benchmark.serving)"
    table = Table("requests per s", "tokens", "who", "requests", "p50 ms", "p99 ms", title=title, title_justify="left")
    for series in record.series:
        if series.rate is not None and series.samples:
            middle, high = percentiles(series.samples)
            table.add_row(
                f"{series.rate:g}",
                f"{series.tokens:,}",
                series.variant,
                str(len(series.samples)),
                milliseconds(middle),
                milliseconds(high),
            )
    return table


def percentiles(samples: Sequence[float]) -> tuple[float, float]:
    """(p50, p99)."""
    import numpy

    middle, high = numpy.percentile(samples, (50, 99))
    return float(middle), float(high)


def milliseconds(seconds: float | None) -> str:
    """As the table has it; "" for None. Three figures or whole milliseconds, whichever says more."""
    if seconds is None:
        return ""
    value = 1000 * seconds
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 10_000 else f"{value:,.0f}"


def _value(row: Row, value: float) -> str:
    return f"{value:g}" if row.quantity == variants.PRUNED_TURNS else milliseconds(value)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _verdict(kind: str, text: str, met: bool) -> str:
    return f"{text} {kind}: " + ("[green]ok[/]" if met else "[red]missed[/]")
