"""Measure, in a fraction of a second at start, about what this machine needs for a layer of this model.

Only a beginning: `cost.CostModel` refines it with the time of every prefill step. On a GPU it waits, which is allowed
before the first request.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from claa_sglang.policy.cost import Constants
from claa_sglang.policy.rates import FLOPS_OF_A_PAIR, FLOPS_OF_A_WEIGHT, ROWS, Layer, Rates, constants

FEW_ROWS = 8  # bound by reading weights and by launching
ROUNDS = 5


def measure(
    *, hidden_size: int, heads: int, head_dim: int, weights: int, dtype: torch.dtype, device: torch.device
) -> Constants:
    """Constants of one layer.

    Args:
        hidden_size, heads, head_dim: of the model, this rank's share of heads.
        weights: elements of one layer's weights.
    """
    found = measure_rates(hidden_size=hidden_size, heads=heads, head_dim=head_dim, dtype=dtype, device=device)
    layer = Layer(weights, heads * head_dim, dtype.itemsize)
    return constants(found, layer, graphs=device.type == "cuda")


def measure_rates(
    *, hidden_size: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, rows: int = ROWS
) -> Rates:
    """What this machine does in a second, at the sizes of a model and `rows` rows: enough to be bound by arithmetic."""
    matrix = torch.zeros(hidden_size, 2 * hidden_size, dtype=dtype, device=device)
    many = torch.zeros(rows, hidden_size, dtype=dtype, device=device)
    few = many[:FEW_ROWS]
    queries = torch.zeros(1, heads, rows, head_dim, dtype=dtype, device=device)

    launch = median_seconds(lambda: few.add_(0), device)
    reading = median_seconds(lambda: few @ matrix, device) - launch
    linear = median_seconds(lambda: many @ matrix, device)
    attend = partial(F.scaled_dot_product_attention, queries, queries, queries, is_causal=True)
    attention = median_seconds(attend, device)
    pairs = rows * (rows + 1) / 2
    return Rates(
        matmul=FLOPS_OF_A_WEIGHT * rows * matrix.numel() / linear,
        attention=FLOPS_OF_A_PAIR * pairs * heads * head_dim / attention,
        bandwidth=matrix.numel() * dtype.itemsize / reading if reading > 0 else math.inf,
        launch=launch,
    )


def median_seconds(call: Callable[[], Tensor], device: torch.device) -> float:
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
