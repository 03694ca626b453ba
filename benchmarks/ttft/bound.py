"""The arithmetic behind the claims: the bound of a pruned request, and the bytes that a decoding step must read.

**The bound.** A pruned request of N tokens runs its early layers, 0 to p, over N tokens and its late ones over the kN
that were kept: early(N) + late(kN). Both are measured with copies of the model that have fewer layers. A request to a
copy of n layers takes

    T_n(tokens) = c(tokens) + n * layer(tokens)

where c is what a request pays once however deep the model is: queue, scheduler, embedding, final norm, head, sampling.
A pruned request pays c once too, so it must not be counted in both terms:

    early(N) = T_e(N)                                                   e = p + 1 layers, c included
    late(kN) = l * layer(kN) = l / (l - 1) * (T_l(kN) - T_1(kN))        l = L - p - 1 layers, c cancelled

Scoring, ranking, gathering, boundary states and late slots are in the pruned request and not in its bound. The plain
sum T_e(N) + T_l(kN), with c twice, is a looser bound; the report shows both.

**Its control.** The same arithmetic says what stock's own dense request should take, from the same truncated models:

    early(N) + late(N) = T_e(N) + l * layer(N),    layer(N) = (T_e(N) - T_1(N)) / (e - 1)

A dense request skips nothing and adds nothing, so what it takes beyond that sum is what engines and short runs differ
by, and no claim about the pruned one can be finer.

**Bytes of a decoding step.** Every weight is read once, the embedding excepted (a row per request), and every cached
key and value once: dense requests read N tokens in all L layers, pruned ones N in e layers and kN in l. Activations are
left out; they are small. So is the boundary state a pruned request writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Depth(NamedTuple):
    """Where a model of `layers` layers is pruned: after layer `prune_layer`."""

    layers: int
    prune_layer: int

    @property
    def early(self) -> int:
        """Layers that see every token."""
        return self.prune_layer + 1

    @property
    def late(self) -> int:
        """Layers that see the kept tokens."""
        return self.layers - self.early


def late_seconds(truncated: float, one_layer: float, late_layers: int) -> float:
    """late(kN) in seconds, from T_l(kN) and T_1(kN) in seconds and l.

    Raises ValueError for l below 2: one layer alone cannot be told from what a request pays once.
    """
    if late_layers < 2:
        raise ValueError(f"{late_layers} late layer: the bound needs at least 2; choose an earlier prune layer")
    return late_layers / (late_layers - 1) * (truncated - one_layer)


def bound_seconds(early: float, truncated: float, one_layer: float, late_layers: int) -> float:
    """early(N) + late(kN) in seconds, from T_e(N), T_l(kN) and T_1(kN) in seconds and l."""
    return early + late_seconds(truncated, one_layer, late_layers)


def parts_seconds(early: float, one_layer: float, depth: Depth) -> float:
    """early(N) + late(N) in seconds, from T_e(N) and T_1(N) in seconds: a dense request, by the sum of its parts.

    Raises ValueError for e below 2, as `late_seconds`.
    """
    if depth.early < 2:
        raise ValueError(
            "1 early layer: the sum of a dense request's parts needs at least 2; choose a later prune layer"
        )
    return early + depth.late / (depth.early - 1) * (early - one_layer)


def weight_bytes(model: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of weights that a decoding step reads: projections, MLP and head of a dense decoder; norms left out.

    model: its config.json. itemsize: bytes per number.
    """
    hidden, dim = model["hidden_size"], head_dim(model)
    heads, kv_heads = model["num_attention_heads"], model["num_key_value_heads"]
    layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * model["intermediate_size"]
    return itemsize * (model["num_hidden_layers"] * layer + model["vocab_size"] * hidden)


def kv_bytes(model: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of one token's key and value in one layer."""
    return 2 * model["num_key_value_heads"] * head_dim(model) * itemsize


def head_dim(model: Mapping[str, Any]) -> int:
    """Dimension of a head, which a configuration may leave to be derived."""
    return model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]


def step_bytes(
    model: Mapping[str, Any],
    itemsize: int,
    batch: int,
    tokens: int,
    generated: float,
    depth: Depth,
    keep_rate: float,
    kv_itemsize: int | None = None,
) -> float:
    """Bytes that one decoding step of `batch` requests reads. keep_rate 1 is a dense request.

    itemsize: bytes of a weight. kv_itemsize: of a number in the cache; None for as many. tokens: of each prompt.
    generated: tokens each request has generated so far, on average; they are in every layer.
    """
    prompt = tokens * depth.early + int(keep_rate * tokens) * depth.late
    cached = prompt + generated * depth.layers
    return weight_bytes(model, itemsize) + batch * cached * kv_bytes(model, kv_itemsize or itemsize)
