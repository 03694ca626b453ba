"""Figures from records: TTFT against prompt length, and TTFT against request rate. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.ttft import variants
from benchmarks.ttft.record import Record
from benchmarks.ttft.report import Row, percentiles, rows


def draw(record: Record, path: Path) -> bool:
    """Write the figure of `record` to `path` (png, svg or pdf, by its suffix); False, and nothing, if it has no data.

    Raises SystemExit with a remedy where matplotlib is missing.
    """
    cold = [row for row in rows(record) if row.scenario == "cold" and row.quantity == variants.TTFT]
    rated = [series for series in record.series if series.rate is not None and series.samples]
    if not cold and not rated:
        return False
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f"{error}; pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    panels = [panel for panel, data in ((_lengths, cold), (_rates, rated)) if data]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        panel(axis, cold if panel is _lengths else rated)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{record.model}, {record.device}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _lengths(axis: Any, cold: list[Row]) -> None:
    """Medians with bars from least to most; each keep rate's bound dashed, in its colour."""
    chunks = {row.chunk for row in cold}
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in cold:
        if row.variant != variants.EARLY and not row.variant.endswith("auto"):
            lines[row.variant + (f", chunk {row.chunk}" if len(chunks) > 1 else "")].append(row)
    for name, line in lines.items():
        line.sort(key=lambda row: row.tokens)
        bars = [[row.value.median - row.value.low for row in line], [row.value.high - row.value.median for row in line]]
        tokens = [row.tokens for row in line]
        drawn = axis.errorbar(tokens, [row.value.median for row in line], bars, marker="o", capsize=3, label=name)
        bounded = [row for row in line if row.bound is not None and row.variant != variants.STOCK]
        if bounded:
            axis.plot(
                [row.tokens for row in bounded],
                [row.bound for row in bounded],
                linestyle="--",
                color=drawn.lines[0].get_color(),
                label=f"{name}: bound early(N) + late(kN)",
            )
    ticks = sorted({row.tokens for row in cold})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xlabel("prompt tokens")
    axis.set_ylabel("TTFT of one request, s")


def _rates(axis: Any, rated: list[Any]) -> None:
    """p50 solid and p99 dashed, a colour per server."""
    for name in dict.fromkeys(series.variant for series in rated):
        line = sorted((series for series in rated if series.variant == name), key=lambda series: series.rate)
        rates = [series.rate for series in line]
        points = [percentiles(series.samples) for series in line]
        (drawn,) = axis.plot(rates, [middle for middle, _ in points], marker="o", label=f"{name}, p50")
        axis.plot(rates, [high for _, high in points], "--", marker="o", color=drawn.get_color(), label=f"{name}, p99")
    lengths = statistics.median(series.tokens for series in rated)
    axis.set_xlabel(f"requests of {lengths:,.0f} tokens per second")
    axis.set_ylabel("TTFT, s")
