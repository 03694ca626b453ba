"""Measure, in a fraction of a second at start, about what this machine needs for a layer of this model.

Only a beginning: `cost.CostModel` refines it with the time of every prefill step. On a GPU it waits, which is allowed
before the first request.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from claa_sglang.policy.cost import Constants

ROWS = 1024  # enough to be bound by arithmetic
FEW_ROWS = 8  # bound by reading weights and by launching
LAUNCHES = 12  # kernels of a layer, about
# What a layer takes SGLang's Python, in launches: on an H200 the 30 layers of SmolLM2 take 17 ms when a graph launches
# them, and 35 when they are pruned (the fastest of each, benchmarks/results/quality_widths_h200.json).
EAGER_LAUNCHES = 80
PRUNE_LAUNCHES = 60  # of a prune: scores of a few layers, a sort, gathers, a second plan for attention
ROUNDS = 5


def measure(
    *, hidden_size: int, heads: int, head_dim: int, weights: int, dtype: torch.dtype, device: torch.device
) -> Constants:
    """Constants of one layer.

    Args:
        hidden_size, heads, head_dim: of the model, this rank's share of heads.
        weights: elements of one layer's weights.
    """
    width = 2 * hidden_size
    matrix = torch.zeros(hidden_size, width, dtype=dtype, device=device)
    share = weights / matrix.numel()  # of a layer's weights, in this matrix
    many = torch.zeros(ROWS, hidden_size, dtype=dtype, device=device)
    few = many[:FEW_ROWS]
    queries = torch.zeros(1, heads, ROWS, head_dim, dtype=dtype, device=device)

    launch = _seconds(lambda: few.add_(0), device)
    per_pass = LAUNCHES * launch + share * max(0.0, _seconds(lambda: few @ matrix, device) - launch)
    linear = share * _seconds(lambda: many @ matrix, device)
    attention = _seconds(lambda: F.scaled_dot_product_attention(queries, queries, queries, is_causal=True), device)
    return Constants(
        per_pass=per_pass,
        per_row=linear / ROWS,
        per_pair=attention / (ROWS * (ROWS + 1) / 2),
        per_prune=PRUNE_LAUNCHES * launch,
        per_eager=launching(launch, linear + attention) if device.type == "cuda" else 0.0,
    )


def launching(launch: float, computing: float) -> float:
    """Seconds that launching a layer eagerly takes beyond `computing` it, meanwhile. launch: of one kernel.

    Never nothing: constants are learned as multiples of these.
    """
    return max(launch, EAGER_LAUNCHES * launch - computing)


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Median time of one call, of ten in a row on a GPU, where a single one is mostly waiting."""
    repeat = 10 if device.type == "cuda" else 1
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / repeat)
    return statistics.median(times[1:])
