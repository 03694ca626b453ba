"""Records of the TTFT benchmark with made-up samples, and a model that is never loaded."""

from __future__ import annotations

from typing import Any

import msgspec

from benchmarks import shapes
from benchmarks.ttft import report, setup, targets, variants
from benchmarks.ttft.record import Record
from benchmarks.ttft.settings import GPU_DEFAULTS
from benchmarks.ttft.variants import STOCK, TTFT, keep

LLAMA = shapes.SHAPES["llama-3.1-8b"]
PRUNED = keep(0.2)


def record(model: str = targets.SHAPE, **more: Any) -> Record:
    """A record of a run of the shape with the targets, without samples."""
    values = {
        "command": "python -m benchmarks.bench_ttft",
        "date": "2026-01-01 00:00 UTC",
        "model": model,
        "shape": LLAMA,
        "itemsize": 2,
        "device": "a GPU",
        "bandwidth": 4e12,
        "prune_layer": 15,
        "settings": msgspec.to_builtins(GPU_DEFAULTS),
        "versions": {"sglang": "0"},
    }
    return Record(**values | more)


def fill(into: Record, scenario: str, tokens: int, quantity: str, **samples: list[float]) -> None:
    """Add one round per value; NAMES says which variant a keyword stands for."""
    for name, values in samples.items():
        for value in values:
            into.add({"scenario": scenario, "tokens": tokens, "chunk": 8192}, {(quantity, NAMES[name]): value})


NAMES = {
    "stock": STOCK,
    "pruned": PRUNED,
    "early": variants.EARLY,
    "late": variants.late(0.2),
    "one": variants.one(0.2),
    "auto": variants.auto(0.2),
    "one_N": variants.ONE,
    "dense": variants.DENSE,
}


def row(of: Record, variant: str) -> report.Row:
    (found,) = [line for line in report.rows(of) if line.variant == variant]
    return found


def full_record() -> Record:
    made = record(stopped="out of time")
    for tokens in (1024, 4096):
        fill(made, "cold", tokens, TTFT, stock=[1.0, 1.1], pruned=[0.6, 0.7], early=[0.5, 0.5], late=[0.1, 0.1])
        fill(made, "cold", tokens, TTFT, one=[0.01, 0.01])
    for rate in (1.0, 2.0):
        for variant, times in ((STOCK, [0.5, 0.9]), (PRUNED, [0.3, 0.4])):
            series = made.series_of(
                scenario="rates", tokens=4096, chunk=8192, rate=rate, quantity=TTFT, variant=variant
            )
            series.samples += times
    return made


def model(random: bool = True) -> setup.Model:
    return setup.Model("m", LLAMA, {"load_format": "dummy"} if random else {}, 2, 15)
