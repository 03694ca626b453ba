"""One prompt answered dense, and by each variant: the answer, and where it leaves the dense one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.blocks.attention import reading_blocks
from benchmarks.blocks.variant import Variant
from claa_sglang.offline.capture import end_tokens


class Answer(NamedTuple):
    """tokens: the greedy answer. equal: of them, how many are the dense answer's before the first that is not.

    logprob: mean log probability of the dense answer's tokens and of its end, each after the dense tokens before it.
        None where no dense answer was given.
    share: mean share of weight on earlier tokens that is read, over blocks and layers; None where nothing was left out.
    """

    tokens: list[int]
    equal: int
    logprob: float | None
    share: float | None


@torch.inference_mode()
def answer(
    model: Any, ids: list[int], most: int, early: int, variant: Variant | None = None, dense: list[int] | None = None
) -> Answer:
    """The greedy answer of at most `most` tokens, without the token that ends it.

    ids: the prompt. early: early layers. variant: how they read; None for everything. dense: the dense answer, which is
    read in one forward first: where it would be given, nothing is decoded.
    """
    from transformers import DynamicCache

    stops, cache = end_tokens(model), DynamicCache(config=model.config)
    with reading_blocks(model, variant, early) as rule:
        logits = _forward(model, ids, cache)[-1:]
        shares = rule.shares if rule else []
        share = sum(shares) / len(shares) if shares else None
        given, equal, total = list(dense or ()), 0, []
        if given:
            logits = torch.cat((logits, _forward(model, given, cache)))
            equal = _equal(logits, given)
        tokens = given[:equal]
        ended = equal == len(given)
        if dense is not None:
            total = _logprobs(logits, given, stops if len(given) < most else frozenset())
        if dense is None or not (ended and (equal == most or int(logits[-1].argmax()) in stops)):
            cache.crop(len(ids) + equal)
            row = logits[equal]
            while len(tokens) < most:
                token = int(row.argmax())
                if token in stops:
                    break
                tokens.append(token)
                row = _forward(model, [token], cache)[-1]
    return Answer(tokens, equal, sum(total) / len(total) if total else None, share)


def _forward(model: Any, ids: list[int], cache: Any) -> Tensor:
    """fp32 logits `[len(ids), vocabulary]`; of a prompt, whose logits nobody reads but the last, `[1, vocabulary]`."""
    rows = torch.tensor([ids], device=model.device)
    keep = 1 if cache.get_seq_length() == 0 else len(ids)
    return model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0].float()


def _equal(logits: Tensor, given: list[int]) -> int:
    """How many of `given` are chosen before the first that is not. logits: of the places before each, and after all."""
    chosen = logits[: len(given)].argmax(-1).tolist()
    return next((i for i, (a, b) in enumerate(zip(chosen, given, strict=True)) if a != b), len(given))


def _logprobs(logits: Tensor, given: list[int], stops: frozenset[int]) -> list[float]:
    """Log probabilities of the tokens, and of ending after them where they ended."""
    table = logits.log_softmax(-1)
    found = [float(table[i, token]) for i, token in enumerate(given)]
    return [*found, float(table[len(given), sorted(stops)].logsumexp(0))] if stops else found
