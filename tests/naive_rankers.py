"""The rankers of claa_sglang/ranking/rankers.py as plain fp64 loops, from queries and keys to a ranking in one go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Layer(NamedTuple):
    """q [W, heads, d] and k [N, kv_heads, d], post-RoPE."""

    q: Tensor
    k: Tensor


def claa(
    layers: Sequence[Layer], scaling: float, *, zscore=True, heads="max", pool="before", kernel=7, queries: int
) -> list[float]:
    """queries: how many of the last ones look (W for CLAA, 1 for last-query)."""
    rows = []
    for layer in layers:
        of_layer = [_mass(layer, scaling, head, queries) for head in range(layer.k.shape[1])]
        if pool == "before":
            of_layer = [_average(row, kernel) for row in of_layer]
        if heads == "sum":
            of_layer = [[math.fsum(column) for column in zip(*of_layer, strict=True)]]
        rows += [_z(row) for row in of_layer] if zscore else of_layer
    best = [max(column) for column in zip(*rows, strict=True)]
    return _average(best, kernel) if pool == "after" else best


def fastkv(layers: Sequence[Layer], scaling: float, *, kernel: int = 7) -> list[float]:
    last = layers[-1]
    rows = [_average(_mass(last, scaling, head, last.q.shape[0]), kernel) for head in range(last.k.shape[1])]
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


def _mass(layer: Layer, scaling: float, kv_head: int, queries: int) -> list[float]:
    """Attention mass from the last `queries` queries to each token before the window, over one GQA group."""
    q, k = layer.q.double(), layer.k.double()
    window, heads, _ = q.shape
    tokens, kv_heads, _ = k.shape
    group = heads // kv_heads
    mass = [0.0] * (tokens - window)
    for head in range(kv_head * group, (kv_head + 1) * group):
        for row in range(window - queries, window):
            visible = tokens - window + row + 1
            logits = [scaling * float(q[row, head] @ k[token, kv_head]) for token in range(visible)]
            largest = max(logits)
            weights = [math.exp(logit - largest) for logit in logits]
            total = math.fsum(weights)
            for token in range(tokens - window):
                mass[token] += weights[token] / total
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
