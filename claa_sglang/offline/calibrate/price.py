"""Predicted time to first token of a schedule, as a share of dense prefill: `cost.py` with constants of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from claa_sglang.config.budget import kept_counts
from claa_sglang.config.config import PruneStep
from claa_sglang.policy.cost import Constants, CostModel, prefill_work, pruned_work
from claa_sglang.policy.machine import measure

CHUNK = 8192  # tokens of a prefill chunk


@dataclass(frozen=True)
class Price:
    """Prices schedules for a cold prompt of `tokens` tokens in a model of `layers` layers, chunks of `chunk` tokens."""

    constants: Constants
    layers: int
    tokens: int
    window: int
    chunk: int = CHUNK

    def share(self, steps: Sequence[PruneStep]) -> float:
        """Predicted prefill time, dense = 1. What all ways share, such as the output matrix, is left out."""
        kept = kept_counts(self.tokens, (step.keep_rate for step in steps), self.window)
        prunes = [step.prune_layer for step in steps]
        cost = CostModel(self.constants)
        pruned = pruned_work(prunes, kept, self.layers, 0, self.tokens, self.chunk)
        return cost.seconds(pruned) / cost.seconds(prefill_work(self.layers, 0, self.tokens, self.chunk))


def measured_constants(model: Any) -> Constants:
    """Constants of one layer of a loaded transformers model, on the device and in the dtype it is in.

    All layers are taken to be alike; embeddings and output matrix are not counted, nor what launching costs a model too
    small for its GPU.
    """
    config = model.config.get_text_config()
    embeddings = (torch.nn.Embedding,)
    outside = {id(p) for m in model.modules() if isinstance(m, embeddings) for p in m.parameters()}
    outside |= {id(p) for p in (model.get_output_embeddings() or torch.nn.Module()).parameters()}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in outside)
    found = measure(
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        weights=weights // config.num_hidden_layers,
        dtype=model.dtype,
        device=model.device,
    )
    return found._replace(per_eager=0.0)
