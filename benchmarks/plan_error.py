"""How far `claa-sglang plan` is off: its predictions against measured times in benchmarks/results.

    python -m benchmarks.plan_error             # the table of docs/results/plan.md, and every point
    python -m benchmarks.plan_error --write     # and the shipped machine records, with their errors in them

Machine records are derived here too, from times of stock and of truncated models: matmul and attention speed by least
squares over stock's cold prompts of 8B, launching and what a request pays once from SmolLM2, which a GPU computes
faster than it is launched. What went into a record is no test of it, and is marked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from benchmarks import shapes
from benchmarks.ttft.record import Record, load
from benchmarks.ttft.settings import QUESTION, TURN_ANSWER
from claa_sglang.plan.machine import SHIPPED, Machine
from claa_sglang.plan.machine import load as load_machine
from claa_sglang.plan.model import shape_of
from claa_sglang.plan.predict import Predictor, Prune
from claa_sglang.policy.cost import prefill_work
from claa_sglang.policy.rates import FLOPS_OF_A_PAIR, FLOPS_OF_A_WEIGHT

RESULTS = Path(__file__).parent / "results"
SMALL_LENGTHS = (1024, 2048, 4096, 7936)
RULE = "keep 0.2"
NO_CHUNK = 1 << 30
MEMORY = {"h200": 141 * 10**9, "h100": 80 * 10**9}  # as these cards are sold
FITTED = {"h200": ("ttft_h200.json", (10240, 32768, 131072)), "h100": ("ttft_h100.json", (10240, 32768))}
CPU = "machine_cpu.json"


class Point(NamedTuple):
    """A measured pair. kind: what of. tokens: of the prompt. prefix: of them, cached. stock, pruned: seconds.

    fitted: whose time went into the machine's record.
    """

    machine: str
    source: str
    model: str
    kind: str
    tokens: int
    prefix: int
    chunk: int
    prune: Prune
    stock: float
    pruned: float
    fitted: str = ""


class Error(NamedTuple):
    """A point and what is predicted for it, in seconds."""

    point: Point
    stock: float
    pruned: float

    @property
    def of_stock(self) -> float:
        """Predicted ratio over the measured one, less 1."""
        return (self.pruned / self.stock) / (self.point.pruned / self.point.stock) - 1


def median(record: Record, scenario: str, tokens: int, variant: str, quantity: str = "TTFT") -> float:
    """Median of a series, in seconds. Raises StopIteration where there is none."""
    key = (scenario, tokens, quantity, variant)
    series = next(s for s in record.series if (s.scenario, s.tokens, s.quantity, s.variant) == key)
    return statistics.median(series.samples)


# --- machine records


def derived(card: str) -> Machine:
    """The record of a card from committed results; `card` as in FITTED."""
    name, lengths = FITTED[card]
    record, small = load(RESULTS / name), load(RESULTS / "small_h200.json")
    layers = small.shape["num_hidden_layers"]
    at = {n: [median(small, "cold", n, who) for who in ("stock", "one layer, N", RULE)] for n in SMALL_LENGTHS}
    graph = statistics.median((stock - one) / (layers - 1) for stock, one, _ in at.values())
    request = statistics.median(one for _, one, _ in at.values()) - graph
    eager = statistics.median(pruned - request for _, _, pruned in at.values()) / layers
    assert record.bandwidth is not None
    matmul, attention = _speeds(record, lengths, request)
    hosts = "" if card == "h200" else ", of an H200's host"
    return Machine(
        device=record.device,
        dtype="bfloat16",
        matmul=_rounded(matmul),
        attention=_rounded(attention),
        bandwidth=record.bandwidth,
        request=_rounded(request),
        graph_layer=_rounded(graph),
        eager_layer=_rounded(eager),
        overlaps=True,
        memory=MEMORY[card],
        head_dim=record.shape["head_dim"],
        source=f"stock in {name} (matmul, attention); small_h200.json (request, layers{hosts})",
        date=record.date[:10],
    )


def _speeds(record: Record, lengths: Sequence[int], request: float) -> tuple[float, float]:
    """FLOP per second of matrix products and of attention by which stock's cold prompts took what they took."""
    shape = shape_of(record.shape, record.model)
    width = shape.heads * shape.head_dim
    rows, rest = [], []
    for tokens in lengths:
        seconds = median(record, "cold", tokens, "stock")
        work = prefill_work(shape.layers, 0, tokens, record.settings["chunks"][0])
        read = (work.passes * shape.layer_weights + shape.vocabulary * shape.hidden) * record.itemsize
        rows.append([FLOPS_OF_A_WEIGHT * shape.layer_weights * work.rows, FLOPS_OF_A_PAIR * width * work.pairs])
        rest.append(seconds - request - read / record.bandwidth)
        rows[-1], rest[-1] = [value / seconds for value in rows[-1]], rest[-1] / seconds
    (per_flop, per_attention), *_ = np.linalg.lstsq(np.array(rows), np.array(rest), rcond=None)
    return 1 / per_flop, 1 / per_attention


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


# --- measured points


def points() -> Iterator[Point]:
    """Every committed pair of one request, stock and pruned, that `plan` can predict."""
    yield from _cold("h200", "ttft_h200.json", fitted="stock")
    yield from _cold("h200", "bound_h200.json")
    yield from _cold("h200", "dense_h200.json")
    yield from _cold("h100", "ttft_h100.json", fitted="stock")
    yield from _second("h200", "ttft_h200.json", "second-turn", RULE)
    yield from _second("h200", "pauses_h200.json", "after-pause", f"{RULE}, unfinished")
    yield from _second("h100", "pauses_h100.json", "after-pause", f"{RULE}, unfinished")
    yield from _half_cached("h200", "ttft_h200.json")
    yield from _cold("h200", "small_h200.json", fitted="both")
    yield from _answers("h200", "answers_smollm2_h200.json", "smollm2-135m", chunk=8192)
    yield from _answers("h200", "answers_qwen_h200.json", "qwen2.5-coder-0.5b", chunk=8192)
    yield from _answers("h100", "answers_qwen_4k_h100.json", "qwen2.5-coder-0.5b", chunk=8192)
    yield from _answers("h100", "answers_qwen_wide_h100.json", "qwen2.5-coder-0.5b", chunk=32768)
    yield from _cpu()


def _cold(machine: str, name: str, fitted: str = "") -> Iterator[Point]:
    record = load(RESULTS / name)
    model = record.model.removesuffix("-instruct")
    for tokens in sorted({s.tokens for s in record.series if s.scenario == "cold"}):
        times = [median(record, "cold", tokens, who) for who in ("stock", RULE)]
        prune = _prune(record)
        yield Point(machine, name, model, "cold", tokens, 0, record.settings["chunks"][0], prune, *times, fitted)


def _second(machine: str, name: str, scenario: str, variant: str) -> Iterator[Point]:
    record = load(RESULTS / name)
    for tokens in sorted({s.tokens for s in record.series if s.scenario == scenario}):
        times = [median(record, scenario, tokens, who) for who in ("stock", variant)]
        chunk, end = record.settings["chunks"][0], tokens + TURN_ANSWER + QUESTION
        yield Point(machine, name, record.model, "2nd turn", end, end - QUESTION, chunk, _prune(record), *times)


def _half_cached(machine: str, name: str) -> Iterator[Point]:
    """A prompt whose first half another one has left in the cache."""
    record = load(RESULTS / name)
    for tokens in sorted({s.tokens for s in record.series if s.scenario == "shared-prefix"}):
        times = [median(record, "shared-prefix", tokens, who) for who in ("stock", RULE)]
        chunk, half = record.settings["chunks"][0], tokens // 2
        yield Point(machine, name, record.model, "half cached", tokens, half, chunk, _prune(record), *times)


def _prune(record: Record) -> Prune:
    return Prune(record.prune_layer, 0.2, record.claa["config"]["window"])


def _answers(machine: str, name: str, model: str, chunk: int) -> Iterator[Point]:
    record = json.loads((RESULTS / name).read_text())
    (step,) = record["claa"]["steps"]
    stock = {row["length"]: row["median"] for row in record["ttft"] if row["ranker"] == "stock"}
    for row in record["ttft"]:
        if row["ranker"] == "claa" and row["length"] in stock:
            prune = Prune(step["prune_layer"], row["keep_rate"], record["claa"]["window"])
            times = stock[row["length"]], row["median"]
            yield Point(machine, name, model, "cold, HTTP", row["length"], 0, chunk, prune, *times)


def _cpu() -> Iterator[Point]:
    """SmolLM2 in float32 on two cores."""
    cost = json.loads((RESULTS / "cpu_cost.json").read_text())
    middle: Callable[[str], float] = lambda key: statistics.median(cost["seconds"][key])  # noqa: E731
    prune = Prune(cost["prune_layer"], cost["keep_rate"], 8)
    times = middle("stock"), middle("pruned")
    yield Point("cpu", "cpu_cost.json", "smollm2-135m", "cold", cost["prompt_tokens"], 0, NO_CHUNK, prune, *times)
    quality = json.loads((RESULTS / "quality_ttft_cpu.json").read_text())
    (step,) = quality["claa"]["steps"]
    dense = {row["length"]: row["median"] for row in quality["ttft"] if row["ranker"] == "dense"}
    for row in quality["ttft"]:
        if row["ranker"] == "claa":
            prune = Prune(step["prune_layer"], row["keep_rate"], quality["claa"]["window"])
            times = dense[row["length"]], row["median"]
            yield Point("cpu", "quality_ttft_cpu.json", "smollm2-135m", "cold", row["length"], 0, 8192, prune, *times)


# --- errors


def machines() -> dict[str, Machine]:
    """Records by name: derived ones, and the measured one of a CPU."""
    return {card: derived(card) for card in FITTED} | {"cpu": load_machine(str(RESULTS / CPU))}


def errors(records: dict[str, Machine]) -> list[Error]:
    """Of every point."""
    found = []
    for point in points():
        predictor = Predictor(records[point.machine], _shape(point.model), point.chunk)
        stock = predictor.dense(point.prefix, point.tokens)
        found.append(Error(point, stock, predictor.pruned(point.prefix, point.tokens, point.prune)))
    return found


def _shape(model: str) -> Any:
    return shape_of(shapes.SHAPES[model], model)


Group = tuple[str, str, str, str, int, str]


def groups(found: Sequence[Error]) -> dict[Group, list[Error]]:
    """Errors by machine, source, model, kind, chunk and what was fitted."""
    by: dict[Group, list[Error]] = {}
    for error in found:
        p = error.point
        by.setdefault((p.machine, p.source, p.model, p.kind, p.chunk, p.fitted), []).append(error)
    return by


def checked(found: Sequence[Error], card: str) -> tuple[str, ...]:
    """What a shipped record says of its own errors, a line for each file, kind and step; not of what was fitted."""
    lines = []
    for (machine, source, model, kind, chunk, fitted), group in groups(found).items():
        if machine == card and fitted != "both":
            lines.append(f"{model}, {kind}, steps of {chunk:,}: {_range(group)} ({len(group)} in {source})")
    return tuple(lines)


def _range(group: Sequence[Error]) -> str:
    return _least_and_most([error.of_stock for error in group])


def _least_and_most(shares: Sequence[float]) -> str:
    """In percent; one number where both are the same."""
    ends = (round(100 * end(shares), 1) + 0.0 for end in (min, max))  # + 0.0: a zero has no sign
    return " to ".join(dict.fromkeys(f"{value:+.1f}" for value in ends)) + " %"


def summary(found: Sequence[Error]) -> str:
    """Markdown: a row for each file, kind of request and step."""
    lines = [
        "| machine | results | model | what | step | points | ratio off | stock off | in the record |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = {"": "nothing", "stock": "stock's times", "both": "all times"}
    for (machine, source, model, kind, chunk, fitted), group in groups(found).items():
        step = "all" if chunk == NO_CHUNK else f"{chunk:,}"
        off = _least_and_most([error.stock / error.point.stock - 1 for error in group])
        lines.append(
            f"| {machine} | `{source}` | {model} | {kind} | {step} | {len(group)} | {_range(group)} | {off} "
            f"| {notes[fitted]} |"
        )
    return "\n".join(lines)


def details(found: Sequence[Error]) -> str:
    """Markdown: a row for each point, times in milliseconds."""
    lines = [
        "| results | tokens | keep rate | stock | predicted | pruned | predicted | of stock | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for error in found:
        p = error.point
        lines.append(
            f"| `{p.source}` | {p.tokens:,}{f', {p.prefix:,} cached' if p.prefix else ''} | {p.prune.keep_rate:g} "
            f"| {_ms(p.stock)} | {_ms(error.stock)} | {_ms(p.pruned)} | {_ms(error.pruned)} "
            f"| {p.pruned / p.stock:.3f} | {error.pruned / error.stock:.3f} |"
        )
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the shipped records")
    args = parser.parse_args(argv)
    records = machines()
    found = errors(records)
    if args.write:
        for card in FITTED:
            record = msgspec.structs.replace(records[card], checked=checked(found, card))
            (SHIPPED / f"{card}.json").write_text(record.to_json())
    print(summary(found), details(found), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
