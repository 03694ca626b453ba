"""Draw the frontier of `benchmarks.eval_quality`: accuracy against TTFT, one line per ranker.

    python -m benchmarks.eval_quality_plot benchmarks/results/quality.json [--out quality.png] [--task TASK]
        [--times TIMES.json] [--add "two prunes=benchmarks/results/quality_steps.json=TIMES_OF_THESE.json" …]

One panel per length. A point is a keep rate: to the left is faster, up is better. TTFT is a share of stock's where the
result was timed with --stock-url, and of dense's otherwise; then dense is the point at 1. Bars are the 95 % intervals
of the result. Needs a result that was measured with --time. `--add` draws the pruned runs of another
result, with other servers, as lines of their own. `--times` takes TTFT from another result, where the machine that
answered is so fast for the model that launching kernels is all that takes time; a ranker without a time there has that
of another at the same rate, as rankers cost next to nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

DENSE, STOCK, ALL = "dense", "stock", "all"
ANY = None  # ranker


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    record = json.loads(args.result.read_text())
    if args.times:
        timed = json.loads(args.times.read_text())
        record["ttft"], record["timed on"] = timed["ttft"], timed["device"]
    try:
        for argument in args.add:
            add(record, argument)
        draw(record, args.task, args.source, args.out or args.result.with_suffix(".png"))
    except PlotError as error:
        print(f"{args.result}: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eval_quality_plot", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON of benchmarks.eval_quality --time")
    parser.add_argument("--task", default=ALL, help="default: %(default)s")
    parser.add_argument("--source", default=ALL, help="of text; default: %(default)s")
    parser.add_argument("--add", nargs="+", default=[], metavar="LABEL=FILE[=TIMES]", help="results of other servers")
    parser.add_argument("--times", type=Path, help="another result, which has the times")
    parser.add_argument("--out", type=Path, help="PNG to write (default: beside the result)")
    return parser.parse_args(argv)


class PlotError(ValueError):
    """The result cannot be drawn; the message says why."""


def add(record: dict[str, Any], argument: str) -> None:
    """Add the pruned runs of `argument`, LABEL=FILE or LABEL=FILE=TIMES, to the record, LABEL as the ranker's name.

    Raises PlotError if it is of another model.
    """
    label, *files = argument.split("=")
    if len(files) not in (1, 2):
        raise PlotError(f"--add {argument!r}: expected LABEL=FILE or LABEL=FILE=TIMES")
    other, timed = (json.loads(Path(file).read_text()) for file in (files[0], files[-1]))
    other["ttft"] = timed["ttft"]
    if other["model"] != record["model"]:
        raise PlotError(f"{files[0]} is of {other['model']}, not of {record['model']}")
    for kind in ("cells", "ttft"):
        pruned = [entry for entry in other[kind] if entry["ranker"] not in (DENSE, STOCK)]
        names = {name: label for name in {entry["ranker"] for entry in pruned}}
        if len(names) > 1:
            names = {name: f"{label}, {name}" for name in names}
        record[kind] += [{**entry, "ranker": names[entry["ranker"]]} for entry in pruned]


def draw(record: dict[str, Any], task: str, source: str, out: Path) -> None:
    """Write the plot. record: a result of benchmarks.eval_quality. Raises PlotError."""
    ratios = {}
    against = baseline(record["ttft"])
    for t in record["ttft"]:
        ratio = t["to_stock"]["median"] if against == STOCK else t["ratio"]
        ratios[t["length"], t["ranker"], t["keep_rate"]] = ratio
        ratios.setdefault((t["length"], ANY, t["keep_rate"]), ratio)
    if not ratios:
        raise PlotError("it has no times: measure with --time")
    cells = [c for c in cells_of(record) if (c["task"], c["source"]) == (task, source)]
    lengths = sorted({cell["length"] for cell in cells} & {length for length, *_ in ratios})
    if not lengths:
        raise PlotError(f"nothing of task {task!r} and source {source!r} has a time")
    figure, panels = pyplot.subplots(
        1, len(lengths), figsize=(3.6 * len(lengths) + 0.8, 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, length in zip(panels[0], lengths, strict=True):
        _panel(panel, [cell for cell in cells if cell["length"] == length], ratios)
        panel.set_title(f"{length:,} tokens")
    panels[0][0].set_ylabel("accuracy, %")
    panels[0][-1].legend(fontsize="small")
    figure.supxlabel(f"TTFT, as a share of {against} ({record.get('timed on', record['device'])})")
    figure.suptitle(f"{record['model']}, {record['device']}, task: {task}, text: {source}", fontsize="medium")
    figure.savefig(out, dpi=150)
    pyplot.close(figure)
    print(out)


def cells_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the first turn and of every form. Where several rankers were asked the same prompts of some lengths
    besides (`benchmarks.answers_run`), the cells of these lengths are theirs."""
    more = record.get("rankers", {}).get("cells", [])
    lengths = {cell["length"] for cell in more}
    cells = [*(cell for cell in record["cells"] if cell["length"] not in lengths), *more]
    return [cell for cell in cells if cell.get("turn", 1) == 1 and cell.get("form", ALL) == ALL]


def baseline(times: Sequence[dict[str, Any]]) -> str:
    """What TTFT is a share of: stock, if every time has a ratio to it, and dense otherwise."""
    return STOCK if times and all(one.get("to_stock") for one in times) else DENSE


def ends(interval: Any) -> tuple[float, float, float]:
    """Mean, low and high of an interval on record; older files have an object where newer ones have a list."""
    mean, low, high = (interval[n] for n in ("mean", "low", "high")) if isinstance(interval, dict) else interval
    return mean, low, high


def _panel(panel: Axes, cells: Sequence[dict[str, Any]], ratios: dict[tuple[int, str | None, float], float]) -> None:
    for cell in cells:
        if cell["ranker"] == DENSE:
            panel.axhline(100 * ends(cell["accuracy"])[0], color="grey", linewidth=0.8, linestyle=":")
    labelled, leftmost = set[float](), 1.0
    for ranker in dict.fromkeys(cell["ranker"] for cell in cells):
        mine = sorted((c for c in cells if c["ranker"] == ranker), key=lambda c: c["keep_rate"])
        x = [
            ratios.get((c["length"], ranker, c["keep_rate"]), ratios.get((c["length"], ANY, c["keep_rate"])))
            for c in mine
        ]
        means, lows, highs = (
            [100 * end for end in each] for each in zip(*(ends(c["accuracy"]) for c in mine), strict=True)
        )
        below = [mean - low for mean, low in zip(means, lows, strict=True)]
        above = [high - mean for mean, high in zip(means, highs, strict=True)]
        style = {"color": "black", "marker": "*", "markersize": 10} if ranker == DENSE else {"marker": "o"}
        panel.errorbar(x, means, yerr=[below, above], capsize=2, linewidth=1.2, elinewidth=0.7, label=ranker, **style)
        for point, mean, cell in zip(x, means, mine, strict=True):
            if ranker != DENSE and point not in labelled:  # rankers share times, and so places
                labelled.add(point)
                panel.annotate(
                    f"{cell['keep_rate']:g}", (point, mean), (4, -10), textcoords="offset points", fontsize=7
                )
        leftmost = min(leftmost, *x)
    panel.set_xlim(leftmost - 0.05, max(panel.get_xlim()[1], 1.05))
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    raise SystemExit(main())
