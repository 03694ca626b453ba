"""A Hugging Face decoder some of whose layers read, in a prefill, a few earlier keys for each block of queries.

A prompt is cut at multiples of the block. A complete block reads itself and, for each KV head, the earlier tokens to
which a sample of its own queries give most weight. What it computes depends on the tokens up to its end alone, so that
its KV could be shared by a prefix cache whose hits end at blocks. An incomplete last block reads everything, and so
does every later forward (decoding).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention

from benchmarks.blocks.variant import Variant

SINKS, LOCAL, POOL = 16, 512, 7  # the first and the last earlier tokens, always read; tokens over which scores average
HELD_OUT = 16  # queries of a block, none of its samples, of whose weights the share that is read is measured
_NAME = "claa_blocks"


@dataclass
class Rule:
    """What runs: `variant` in `layers`. shares: of weight on earlier tokens, how much falls on those that are read."""

    variant: Variant
    layers: frozenset[int]
    shares: list[float] = field(default_factory=list)


_rule: ContextVar[Rule | None] = ContextVar("rule", default=None)


@contextmanager
def reading_blocks(model: Any, variant: Variant | None, early: int) -> Iterator[Rule | None]:
    """`model` (a transformers causal LM) reads by `variant` until the context ends; None reads everything.

    early: layers from the first one that count as early. Batches of one, and a prefill in one forward.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    layers = frozenset(range(early) if variant is None or variant.layers is None else variant.layers)
    rule = None if variant is None else Rule(variant, layers)
    before, token = model.config._attn_implementation, _rule.set(rule)
    try:
        model.set_attn_implementation(_NAME)
        yield rule
    finally:
        model.set_attn_implementation(before)
        _rule.reset(token)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rule, rows = _rule.get(), query.shape[2]
    if rule is None or rows == 1 or rows != key.shape[2] or module.layer_idx not in rule.layers:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = attend(query[0], key[0], value[0], scaling, rule)
    return out.transpose(0, 1)[None], None


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, rule: Rule) -> Tensor:
    """Attention of a whole prompt: `[heads, N, d]`.

    q: post-RoPE queries `[heads, N, d]`; k, v: `[kv_heads, N, d]`. heads is a multiple of kv_heads.
    """
    variant, tokens, found = rule.variant, q.shape[1], []
    for start in range(0, tokens, variant.block):
        end = min(start + variant.block, tokens)
        own = q[:, start:end]
        if end - start < variant.block or start <= max(variant.budget, SINKS + LOCAL):
            found.append(_over(own, k[:, :end], v[:, :end], scaling))
            continue
        chosen = select(own, k[:, :start], scaling, variant)
        rule.shares.append(share(own, k[:, :start], chosen, scaling, variant))
        index = chosen[..., None].expand(-1, -1, k.shape[2])
        keys, values = (torch.cat((x[:, :start].gather(1, index), x[:, start:end]), 1) for x in (k, v))
        found.append(_over(own, keys, values, scaling))
    return torch.cat(found, 1)


def select(block: Tensor, keys: Tensor, scaling: float, variant: Variant) -> Tensor:
    """Which earlier tokens a block reads: int64 `[kv_heads, budget]`, in any order.

    block: its queries `[heads, S, d]`; keys: `[kv_heads, s, d]`, s above the budget.
    """
    step = variant.block // variant.samples
    weights = _weights(block[:, step - 1 :: step], keys, scaling)
    scores = weights.amax(1) if variant.how == "max" else weights.sum(1)
    if variant.heads == "shared":
        scores = scores.amax(0, keepdim=True).expand(scores.shape[0], -1)
    scores = avg_pool1d(scores, POOL, 1, POOL // 2, count_include_pad=False)
    scores[:, :SINKS] = torch.inf
    scores[:, keys.shape[1] - LOCAL :] = torch.inf
    return scores.topk(variant.budget, sorted=False).indices


def share(block: Tensor, keys: Tensor, chosen: Tensor, scaling: float, variant: Variant) -> float:
    """Of the weight that other queries of the block give earlier tokens, how much is on `chosen`; mean over heads."""
    step = variant.block // HELD_OUT
    weights = _weights(block[:, step // 2 :: step], keys, scaling).sum(1)
    return float((weights.gather(1, chosen).sum(1) / weights.sum(1)).mean())


def _weights(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Softmax over `keys` of each query: fp32 `[kv_heads, group * queries, s]`."""
    grouped = queries.reshape(keys.shape[0], -1, keys.shape[2])
    return (scaling * torch.bmm(grouped, keys.transpose(1, 2)).float()).softmax(-1)


def _over(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last rows: `[heads, rows, d]`; keys that come before all of them are seen by each."""
    rows, tokens, group = queries.shape[1], keys.shape[1], queries.shape[0] // keys.shape[0]
    k, v = (x.repeat_interleave(group, 0)[None] for x in (keys, values))
    if rows == tokens:
        return scaled_dot_product_attention(queries[None], k, v, is_causal=True, scale=scaling)[0]
    seen = torch.ones(rows, tokens, dtype=torch.bool, device=queries.device).tril(tokens - rows)
    return scaled_dot_product_attention(queries[None], k, v, attn_mask=seen, scale=scaling)[0]
