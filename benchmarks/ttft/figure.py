"""The README's figure: time to first token of one cold request, stock beside pruned, per prompt length of a record.

    python -m benchmarks.ttft.figure benchmarks/results/ttft_h200.json benchmarks/results/ttft_by_length_h200.png

Lengths differ by a factor of forty in time, so each has an axis of its own that begins at zero. Needs matplotlib.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.ttft import variants
from benchmarks.ttft.record import Record
from benchmarks.ttft.report import Row, rows

COLOURS = {variants.STOCK: "#9aa0a6", "pruned": "#e8710a"}


def pairs(record: Record, pruned: str = "keep 0.2") -> list[tuple[Row, Row]]:
    """Stock's and the pruned row of each length of scenario "cold", shortest first. KeyError if one is missing."""
    cold = {(r.tokens, r.variant): r for r in rows(record) if r.scenario == "cold" and r.quantity == variants.TTFT}
    return [(cold[length, variants.STOCK], cold[length, pruned]) for length in sorted({tokens for tokens, _ in cold})]


def draw(record: Record, path: Path) -> None:
    """Write the figure to `path`, as png, svg or pdf by its suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = pairs(record)
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(10, 3.4), squeeze=False, layout="constrained")
    for axis, (stock, pruned) in zip(axes[0], lengths, strict=True):
        _panel(axis, stock, pruned)
    rounds = lengths[0][0].count
    figure.suptitle("Time to first token of one long prompt, nothing cached", fontsize=13, fontweight="bold")
    figure.supxlabel(
        f"{record.model} shape with random weights, one {record.device}, keep rate 0.2, medians of {rounds} rounds",
        fontsize=9,
        color="#5f6368",
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, stock: Row, pruned: Row) -> None:
    assert pruned.of_stock is not None
    values = [stock.value.median, pruned.value.median]
    bars = axis.bar(["stock SGLang", "claa-sglang"], values, color=list(COLOURS.values()), width=0.6)
    labels = [_time(values[0]), f"{_time(values[1])}\n{pruned.of_stock.median:.2f} of stock"]
    axis.bar_label(bars, labels, padding=3, fontsize=11)
    axis.set_title(f"{stock.tokens:,} tokens", fontsize=11)
    axis.set_ylim(0, 1.3 * values[0])
    axis.set_yticks([])
    axis.spines[["top", "right", "left"]].set_visible(False)


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


if __name__ == "__main__":
    source, target = sys.argv[1:]
    draw(msgspec.json.decode(Path(source).read_bytes(), type=Record), Path(target))
