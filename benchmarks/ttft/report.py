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
from benchmarks.ttft.bound import Depth, bound_seconds, late_seconds, parts_seconds, step_bytes
from benchmarks.ttft.record import Record, Series
from benchmarks.ttft.settings import DECODE_TOKENS

WIDTH = 150  # characters that the widest table needs, also where the output is no terminal
SECOND_TURN = 1.1  # times late(kN) a second turn may take on top of stock's own
_HELPERS = ("late layers", "one layer")  # variants that only serve a bound


class Spread(msgspec.Struct, frozen=True):
    """Median, least and most of samples."""

    median: float
    low: float
    high: float


class Row(msgspec.Struct, kw_only=True):
    """One line of the table. Times in seconds; ratios are those within rounds.

    bound: early(N) + late(kN), of stock early(N) + late(N), or what the target of a second turn allows. plain_sum: with
    what a request pays once counted twice. step_bytes, bandwidth_share: of a decoding step; the share is of what the
    memory can move. verdicts: per kind of target ("of stock", ...), (range in words, whether it was met).
    """

    scenario: str
    tokens: int
    chunk: int
    quantity: str
    variant: str
    count: int
    value: Spread
    of_stock: Spread | None = None
    bound: float | None = None
    of_bound: Spread | None = None
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


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    return Spread(statistics.median(values), min(values), max(values))


def _row(record: Record, series: Series) -> Row:
    values = series.samples
    row = Row(
        scenario=series.scenario,
        tokens=series.tokens,
        chunk=series.chunk,
        quantity=series.quantity,
        variant=series.variant,
        count=len(values),
        value=spread(values),
    )
    rate = keep_rate(series.variant)
    stock = _sibling(record, series, variants.STOCK)
    if series.variant != variants.STOCK and stock and series.quantity not in variants.COUNTS:
        row.of_stock = spread(ratios(values, stock))
    bound = control(record, series) if rate is None else bounds(record, series, rate)
    if bound and series.quantity not in variants.COUNTS:
        row.bound = statistics.median(bound)
        row.of_bound = spread(ratios(values, bound))
    if series.scenario == "cold" and rate is not None:
        early, late = (_sibling(record, series, name) for name in (variants.EARLY, variants.late(rate)))
        sums = [a + b for a, b in zip(early, late, strict=False)]
        row.plain_sum = statistics.median(sums) if sums else None
    if series.scenario == "decode":
        depth = Depth(record.shape["num_hidden_layers"], record.prune_layer)
        if rate is not None and series.variant == variants.over_kept(rate):
            depth = depth._replace(prune_layer=record.settings["decode_dense_layers"] - 1)
        batch = variants.batch_of(series.quantity) or record.settings["decode_batch"]  # as earlier files have it
        row.step_bytes = step_bytes(
            record.shape,
            record.itemsize,
            batch,
            series.tokens,
            DECODE_TOKENS / 2,
            depth,
            1.0 if rate is None else rate,
            kv_itemsize=1 if record.settings.get("kv_cache_dtype", "").startswith("fp8") else None,
        )
        ranks = record.settings.get("tp_size", 1)  # each reads its own part, from its own memory
        if record.bandwidth:
            row.bandwidth_share = row.step_bytes / row.value.median / (ranks * record.bandwidth)
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


def control(record: Record, series: Series) -> list[float]:
    """What stock's own request is held against, per round: the sum of its parts; [] where they were not measured."""
    if (series.scenario, series.variant) != ("cold", variants.STOCK):
        return []
    depth = Depth(record.shape["num_hidden_layers"], record.prune_layer)
    early, one = (_sibling(record, series, name) for name in (variants.EARLY, variants.ONE))
    return [parts_seconds(e, o, depth) for e, o in zip(early, one, strict=False)]


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
        targets.OF_STOCK: row.of_stock and row.of_stock.median,
        targets.OF_BOUND: row.of_bound and row.of_bound.median,
        targets.SECONDS: None if stock is None else row.value.median - stock,
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
    console = console or Console(width=max(WIDTH, Console().width))
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    layers, chunks = record.shape["num_hidden_layers"], ", ".join(map(str, record.settings["chunks"]))
    console.print(f"[bold]{record.model}[/], prune layer {record.prune_layer} of {layers}, chunks of {chunks} tokens")
    console.print(f"{record.device}; {versions}; {record.date}", highlight=False)
    lines = rows(record)
    for scenario in dict.fromkeys(line.scenario for line in lines):
        console.print(_times(scenario, [line for line in lines if line.scenario == scenario]))
    if any(line.step_bytes for line in lines):
        console.print(_steps(lines))
    if any(series.rate is not None for series in record.series):
        console.print(_rates(record))
    if lines:
        console.print("ratios: those within rounds, median (min to max)", highlight=False)
    for engine in record.engines:
        took = f"{engine['name']} {engine['seconds']:.0f} s"
        console.print(f"engine start: {took}, {engine['attention_backend']}", highlight=False)
    if spent := record.claa.get("startup_seconds"):
        # The server's process is done with its part when the scheduler's begins.
        total = sum(spent.values())
        parts = " + ".join(f"{process} {seconds:.2f}" for process, seconds in spent.items())
        verdict = _verdict("seconds", f"at most {targets.OWN_STARTUP:g}", total <= targets.OWN_STARTUP)
        console.print(f"the plugin's own time in a start: {total:.2f} s ({parts}); {verdict}", highlight=False)
    for process, spent in record.claa.get("startup_parts", {}).items():
        largest = sorted(spent.items(), key=lambda item: -item[1])
        console.print(
            f"  {process}: " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in largest), highlight=False
        )
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
    "median ms": lambda row: _value(row, row.value.median),
    "min to max": lambda row: f"{_value(row, row.value.low)} to {_value(row, row.value.high)}",
    "of stock": lambda row: _ratio(row.of_stock),
    "bound": lambda row: milliseconds(row.bound),
    "plain sum": lambda row: milliseconds(row.plain_sum),
    "of bound": lambda row: _ratio(row.of_bound),
    "target": lambda row: "; ".join(_verdict(kind, *verdict) for kind, verdict in row.verdicts.items()),
}
_CAPTIONS = {
    "cold": "bound: early(N) + late(kN); of stock, as a control, early(N) + late(N); plain sum: what a request pays "
    "once is counted twice",
    "second-turn": f"bound: stock's own second turn + {SECOND_TURN} late(kN)",
}


def _times(scenario: str, lines: list[Row]) -> Table:
    """Columns in which nothing stands are left out, and the chunk where there is one."""
    table = Table(title=scenario, caption=_CAPTIONS.get(scenario), title_justify="left", caption_justify="left")
    columns = {name: [show(line) for line in lines] for name, show in _COLUMNS.items()}
    columns = {
        name: cells for name, cells in columns.items() if any(cells) and (name != "chunk" or len(set(cells)) > 1)
    }
    for name in columns:
        table.add_column(name, justify="left" if name in ("what", "who", "target") else "right")
    for index, cells in enumerate(zip(*columns.values(), strict=True)):
        last = lines[index + 1 : index + 2]
        table.add_row(*cells, end_section=bool(last) and last[0].tokens != lines[index].tokens)
    return table


def _steps(lines: list[Row]) -> Table:
    table = Table(
        "tokens",
        "batch",
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
            speed = line.step_bytes / line.value.median
            batch = variants.batch_of(line.quantity)  # earlier files have theirs among the settings
            size, speed_text = f"{line.step_bytes / 1e9:.2f}", f"{speed / 1e12:.3f}"
            table.add_row(f"{line.tokens:,}", str(batch or ""), line.variant, size, speed_text, share)
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
    return f"{value:g}" if row.quantity in variants.COUNTS else milliseconds(value)


def _ratio(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _verdict(kind: str, text: str, met: bool) -> str:
    return f"{text} {kind}: " + ("[green]ok[/]" if met else "[red]missed[/]")
