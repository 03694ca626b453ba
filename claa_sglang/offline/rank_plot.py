"""The paper's per-layer figure of a rank report: one panel per measure, one line per ranker."""

from __future__ import annotations

from pathlib import Path

from claa_sglang.offline import rank_table
from claa_sglang.offline.rank_report import MEASURES, Report

_LABELS = {
    "rho": "Spearman's rho with the oracle",
    "recall": "recall of the oracle's tokens",
    "mass": "oracle mass kept",
    "answer": "kept of what the answer repeats",
}


def plot(report: Report, path: Path) -> None:
    """Write a PNG to `path`. Bands are one standard error over prompts; grey layers are no candidates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures = [measure for measure in MEASURES if measure in report.rankers[0].curves]
    figure = Figure(figsize=(5 * len(measures), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, measure in zip(figure.subplots(1, len(measures)), measures, strict=True):
        for index, row in enumerate(report.rankers):
            curve = row.curves[measure]
            flat = min(curve.mean) == max(curve.mean)
            color = "black" if row.ranker == "oracle" else f"C{index}"
            axes.plot(curve.mean, color=color, linestyle="--" if flat else "-", label=row.ranker, linewidth=1.6)
            low = [mean - error for mean, error in zip(curve.mean, curve.standard_error, strict=True)]
            high = [mean + error for mean, error in zip(curve.mean, curve.standard_error, strict=True)]
            axes.fill_between(range(report.layers), low, high, color=color, alpha=0.15, linewidth=0)
        axes.axvspan(-0.5, report.first_layer - 0.5, color="grey", alpha=0.12, linewidth=0)
        axes.axvspan(report.last_layer + 0.5, report.layers - 0.5, color="grey", alpha=0.12, linewidth=0)
        axes.axvline(report.layers // 2 - 1, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel="prune after layer (dotted: half depth)", ylabel=_LABELS[measure])
        axes.set(xlim=(-0.5, report.layers - 0.5), ylim=(None, 1.02))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(rank_table.heading(report).partition(" (")[0])
    figure.savefig(path, dpi=130)
