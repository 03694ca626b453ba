"""What a machine does in a second, and what follows for a layer: the step from a machine to the constants of a model.

Host-side: no torch, no SGLang. `machine.py` measures a machine's rates; a server does that at start, and
`claa-sglang plan` reads them from a record.
"""

from __future__ import annotations

from typing import NamedTuple

from claa_sglang.policy.cost import Constants

ROWS = 1024  # rows at which a layer's eager launches are weighed against what it computes
LAUNCHES = 12  # kernels of a layer, about
# What a layer takes SGLang's Python, in launches: on an H200 the 30 layers of SmolLM2 take 17 ms when a graph launches
# them, and 35 when they are pruned (the fastest of each, benchmarks/results/quality_widths_h200.json).
EAGER_LAUNCHES = 80
PRUNE_LAUNCHES = 60  # of a prune: scores of a few layers, a sort, gathers, a second plan for attention
FLOPS_OF_A_WEIGHT = 2  # per row: a multiplication and an addition
FLOPS_OF_A_PAIR = 4  # per element of a query: two of its product with the key, two of its share of the value


class Rates(NamedTuple):
    """Of a machine. matmul, attention: FLOP per second. bandwidth: bytes per second. launch: seconds of one kernel."""

    matmul: float
    attention: float
    bandwidth: float
    launch: float = 0.0


class Layer(NamedTuple):
    """One decoder layer. weights: elements. query_width: query heads times head size. itemsize: bytes of an element."""

    weights: int
    query_width: int
    itemsize: int


def constants(rates: Rates, layer: Layer, graphs: bool = False) -> Constants:
    """Seconds of one layer for each kind of work. graphs: whether dense forwards run in CUDA graphs here."""
    per_row = FLOPS_OF_A_WEIGHT * layer.weights / rates.matmul
    per_pair = FLOPS_OF_A_PAIR * layer.query_width / rates.attention
    computing = ROWS * per_row + ROWS * (ROWS + 1) / 2 * per_pair
    return Constants(
        per_pass=LAUNCHES * rates.launch + layer.weights * layer.itemsize / rates.bandwidth,
        per_row=per_row,
        per_pair=per_pair,
        per_prune=PRUNE_LAUNCHES * rates.launch,
        per_eager=launching(rates.launch, computing) if graphs else 0.0,
    )


def launching(launch: float, computing: float) -> float:
    """Seconds that launching a layer eagerly takes beyond `computing` it, meanwhile. launch: of one kernel.

    Never nothing: constants are learned as multiples of these.
    """
    return max(launch, EAGER_LAUNCHES * launch - computing)
