"""What layers after a prune see: a forward of a Hugging Face decoder that drops rows, as the server's late layers do.

Decoder layers are called by their model with all they need (rows, rotary embeddings, positions), so the rows are
dropped in front of the first late layer and its companions in front of each; kept tokens keep their positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from claa_sglang.offline.capture import CaptureError, observing
from claa_sglang.ranking.rankers import STATISTICS, Statistic


class _SeenEnough(Exception):
    """Layers after the last one asked for need not run."""


def late_statistic(
    model: Any,
    input_ids: Tensor,
    kept: Tensor,
    statistic: Statistic,
    *,
    prune_layer: int,
    last_layer: int,
    window: int,
) -> Tensor:
    """A ranker's statistic of the layers prune_layer+1 to last_layer when only `kept` and the window run there.

    model: a transformers causal LM, any device; input_ids: int64 [N]; kept: int64 [k], ascending, below N - window.
    Returns fp32 [last_layer - prune_layer, kv_heads, k] on the CPU, as `rankers.STATISTICS` define it for such a layer.
    Raises CaptureError for a model whose layers are not in `get_decoder().layers`.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise CaptureError(f"{type(model).__name__} has no list of decoder layers; calibrate it with --steps 1")
    tokens = input_ids.numel()
    rows = torch.cat((kept, torch.arange(tokens - window, tokens))).to(model.device)
    seen: list[Tensor] = []

    def observe(layer: int, q: Tensor, k: Tensor, scaling: float) -> None:
        if layer > prune_layer:
            seen.append(STATISTICS[statistic](q[-window:], k, scaling=scaling).cpu())
        if layer == last_layer:
            raise _SeenEnough

    def cut(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, *others = args
        cosine, sine = kwargs["position_embeddings"]
        return (hidden[:, rows] if module is layers[prune_layer + 1] else hidden, *others), {
            **kwargs,
            "attention_mask": None,  # causal among the rows there are
            "position_ids": kwargs["position_ids"][:, rows],
            "position_embeddings": (cosine[:, rows], sine[:, rows]),
        }

    hooks = [layer.register_forward_pre_hook(cut, with_kwargs=True) for layer in layers[prune_layer + 1 :]]
    try:
        with torch.inference_mode(), observing(model, observe):
            model(input_ids=input_ids.to(model.device)[None], use_cache=False, logits_to_keep=1)
    except _SeenEnough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)
