"""The rankers of claa_sglang/ranking/rankers.py as plain fp64 loops, from queries and keys to a ranking in one go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor


class Layer(NamedTuple):
    """q [W, heads, d] and k [N, kv_heads, d], post-RoPE."""

    q: Tensor
    k: Tensor


PAPER_QUERIES = 8  # of the window's, in the papers of CLAA and FastKV
LOSS = 0.02  # per token, of what a token carries to those after it


def claa(
    layers: Sequence[Layer],
    scaling: float,
    *,
    zscore=True,
    heads="max",
    pool="before",
    kernel=7,
    queries: int,
    peaks: bool,
    loss: float,
    last: bool = False,
) -> list[float]:
    """queries: how many of the last ones look. peaks: their largest weight, not their sum. loss: 0 carries nothing.

    last: the better of a token's place so, and of the one that the last query alone gives it.
    """
    if last:
        switches = {"zscore": zscore, "heads": heads, "pool": pool, "kernel": kernel}
        own = claa(layers, scaling, **switches, queries=queries, peaks=peaks, loss=0)
        alone = claa(layers, scaling, **switches, queries=1, peaks=False, loss=0)
        # What loses more than all there is in one step carries nothing.
        return [max(pair) for pair in zip(carried(own, loss or math.inf), carried(alone, math.inf), strict=True)]
    rows = []
    for layer in layers:
        of_layer = [_mass(layer, scaling, head, queries, peaks) for head in range(layer.k.shape[1])]
        if pool == "before":
            of_layer = [_average(row, kernel) for row in of_layer]
        if heads == "sum":
            of_layer = [[math.fsum(column) for column in zip(*of_layer, strict=True)]]
        rows += [_z(row) for row in of_layer] if zscore else of_layer
    best = [max(column) for column in zip(*rows, strict=True)]
    best = _average(best, kernel) if pool == "after" else best
    return carried(best, loss) if loss else best


def carried(values: Sequence[float], loss: float) -> list[float]:
    """Each token's ln(M / rank), or the most that one before it has left after `loss` a token."""
    best_first = sorted(range(len(values)), key=lambda position: (-values[position], position))
    result = [0.0] * len(values)
    for place, position in enumerate(best_first):
        result[position] = math.log(len(values) / (place + 1))
    for position in range(1, len(values)):
        result[position] = max(result[position], result[position - 1] - loss)
    return result


def fastkv(layers: Sequence[Layer], scaling: float, *, kernel: int = 7) -> list[float]:
    last = layers[-1]
    rows = [_average(_mass(last, scaling, head, PAPER_QUERIES), kernel) for head in range(last.k.shape[1])]
    return [math.fsum(column) for column in zip(*rows, strict=True)]


def gemfilter(layers: Sequence[Layer], scaling: float) -> list[float]:
    q, k = layers[-1].q.double(), layers[-1].k.double()
    window, heads, _ = q.shape
    tokens, kv_heads, _ = k.shape
    logits = [
        math.fsum(float(q[-1, head] @ k[token, head // (heads // kv_heads)]) for head in range(heads))
        for token in range(tokens)
    ]
    return _average(logits, 5)[: tokens - window]


# What a name, with no other switch, gives `claa`. A number of queries above the window means all of it.
CLAA_SWITCHES: dict[str, dict[str, Any]] = {
    "claa": {"queries": 10**6, "peaks": True, "loss": LOSS, "last": True},
    "claa:last=off": {"queries": 10**6, "peaks": True, "loss": LOSS},
    "claa:queries=sum": {"queries": PAPER_QUERIES, "peaks": False, "loss": LOSS},
    "claa:carry=0": {"queries": 10**6, "peaks": True, "loss": 0.0, "last": True},
    "claa:last=off,carry=0": {"queries": 10**6, "peaks": True, "loss": 0.0},
    "claa:paper": {"queries": PAPER_QUERIES, "peaks": False, "loss": 0.0},
    "last-query": {"queries": 1, "peaks": False, "loss": LOSS},
    "last-query:carry=0": {"queries": 1, "peaks": False, "loss": 0.0},
}
# name -> its oracle: (layers, scaling) to a ranking, with more switches by name. Uniform has none: it is a sample.
ORACLES: dict[str, Callable[..., list[float]]] = {
    **{name: partial(claa, **switches) for name, switches in CLAA_SWITCHES.items()},
    "fastkv": fastkv,
    "gemfilter": gemfilter,
}


def _mass(layer: Layer, scaling: float, kv_head: int, queries: int, peaks: bool = False) -> list[float]:
    """Attention that the last `queries` queries give each token before the window, over one GQA group.

    Summed over queries and group, or with `peaks` the largest.
    """
    q, k = layer.q.double(), layer.k.double()
    window, heads, _ = q.shape
    tokens, kv_heads, _ = k.shape
    group = heads // kv_heads
    mass = [0.0] * (tokens - window)
    for head in range(kv_head * group, (kv_head + 1) * group):
        for row in range(max(0, window - queries), window):
            visible = tokens - window + row + 1
            logits = [scaling * float(q[row, head] @ k[token, kv_head]) for token in range(visible)]
            largest = max(logits)
            weights = [math.exp(logit - largest) for logit in logits]
            total = math.fsum(weights)
            for token in range(tokens - window):
                weight = weights[token] / total
                mass[token] = max(mass[token], weight) if peaks else mass[token] + weight
    return mass


def _average(values: Sequence[float], kernel: int) -> list[float]:
    half = kernel // 2
    return [math.fsum(values[max(0, i - half) : i + half + 1]) / kernel for i in range(len(values))]


def _z(row: Sequence[float]) -> list[float]:
    if len(row) == 1:
        return [0.0]
    mean = math.fsum(row) / len(row)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in row) / (len(row) - 1))
    return [(value - mean) / (std + 1e-8) for value in row]
