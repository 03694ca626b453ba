"""Look at the queries and keys of every layer while a Hugging Face decoder answers a prompt.

Nothing of a model's forward is copied: transformers hands every attention layer's post-RoPE queries and keys to a
function from a registry (`AttentionInterface`), and an observed model is pointed at one of ours, which shows them to
the observer and then computes what `sdpa` computes. So it works for any decoder that uses the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from claa_sglang.offline.basics import CaptureError

_NAME = "claa_observed"
# Arguments of an attention function under which softmax(scaling * q k^T) over all keys is not what the model computes.
_OTHER_ATTENTION = ("sliding_window", "softcap", "s_aux", "position_bias")


class Observer(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, scaling: float) -> None:
        """Called in layer order in every forward of an observed model.

        q: [rows, heads, d] post-RoPE queries of the tokens of this forward; k: [tokens, kv_heads, d] post-RoPE keys of
        all tokens so far, this forward's last. Views into the model's own buffers, in its dtype: copy what is kept.
        """


_observer: ContextVar[Observer] = ContextVar("observer")


@contextmanager
def observing(model: Any, observer: Observer) -> Iterator[None]:
    """Show `observer` every attention of `model` (a transformers causal LM) until the context ends.

    Attention runs as `sdpa` meanwhile, and the model's own implementation is restored at the end. Batches of one.
    Raises CaptureError for attention that is not over all keys (where it is seen), and if contexts are nested.
    """
    if _observer.get(None) is not None:
        raise CaptureError("a model is being observed already; leave that context first")
    _register()
    before = model.config._attn_implementation
    token = _observer.set(observer)
    try:
        model.set_attn_implementation(_NAME)
        if model.config._attn_implementation != _NAME:
            raise CaptureError(
                f"{type(model).__name__} does not take its attention from transformers' registry, so it cannot be "
                "observed; use a model of a family in docs/models.md"
            )
        yield
    finally:
        model.set_attn_implementation(before)
        _observer.reset(token)


def greedy_answer(model: Any, input_ids: Tensor, observer: Observer, *, max_answer_tokens: int) -> tuple[int, ...]:
    """Prefill the prompt once, then decode greedily with the model's own KV cache, under observation.

    input_ids: int64 [N]. max_answer_tokens: 1 or more. Returns the answer's token ids, without the end-of-sequence
    token that may have ended it.
    Forwards, and so calls per layer: one with N rows, then one of a single row for each further token that is
    predicted, an end-of-sequence token included: the last row of every forward predicts one token.

    Memory: the KV cache and activations, linear in N; logits of the last row only. `sdpa` makes no [N, N] on CPU
    (tested). On a GPU load the model in bf16 or fp16: for fp32 and grouped queries PyTorch may fall back on a kernel
    that does.
    """
    from transformers import DynamicCache

    if input_ids.ndim != 1 or input_ids.numel() < 2 or max_answer_tokens < 1:
        raise CaptureError(
            f"prompt of shape {tuple(input_ids.shape)}, at most {max_answer_tokens} answer tokens; give token ids [N] "
            "with N of at least 2, and at least 1 answer token"
        )
    stops = end_tokens(model)
    cache = DynamicCache(config=model.config)
    rows, answer = input_ids.to(model.device)[None], list[int]()
    with torch.inference_mode(), observing(model, observer):
        while len(answer) < max_answer_tokens:
            out = model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = int(out.logits[0, -1].argmax())
            if token in stops:
                break
            answer.append(token)
            rows = torch.tensor([[token]], device=model.device)
    return tuple(answer)


def end_tokens(model: Any) -> frozenset[int]:
    """Token ids that end an answer, from the generation configuration; empty if the model names none."""
    ids = model.generation_config.eos_token_id
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _observed_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _observed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    other = [name for name in _OTHER_ATTENTION if kwargs.get(name) is not None]
    if other or query.shape[0] != 1:
        what = f"attention with {', '.join(other)}" if other else f"a batch of {query.shape[0]}"
        raise CaptureError(f"{type(module).__name__}: {what} cannot be studied; CLAA needs full attention, one prompt")
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    _observer.get()(module.layer_idx, query[0].transpose(0, 1), key[0].transpose(0, 1), scaling)
    sdpa: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
    return sdpa(module, query, key, value, attention_mask, **kwargs)
