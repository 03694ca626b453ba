"""What a request's sampling parameters make of the reference's logits: the greedy answer that SGLang should give.

Written from SGLang's documentation of the parameters, and independent of its code: one row after another, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.answers import TOLERANCE, Ask
from tests.byte_tokenizer import EOS_ID
from tests.reference_model import ReferenceModel
from tests.tiny_models import VOCAB_SIZE


def logits(reference: ReferenceModel, asked: Ask, answer: Sequence[int]) -> Tensor:
    """Raw logits `[answer tokens, vocabulary]`, where the reference has log probabilities."""
    seen: list[Tensor] = []
    hook = reference.model.lm_head.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        if asked.keep is None:
            reference.dense(asked.prompt, answer)
        else:
            reference.pruned(asked.prompt, answer, asked.keep)
    finally:
        hook.remove()
    return seen[0][0, -len(answer) :].float()


def greedy(
    rows: Tensor, asked: Ask, answer: Sequence[int], params: dict[str, Any], grammar: Grammar | None = None
) -> list[int]:
    """First choice after each part of `answer` under `params`; the answer's own where it is as good.

    rows: `logits` of that answer. SGLang prepares a step before it has read the token of the one before. So penalties
    may come one token late, of dense requests too, and count the prompt's last token in between: either is right here.
    """
    choices = []
    for i, row in enumerate(rows):
        allowed = grammar.allowed() if grammar is not None else torch.ones(VOCAB_SIZE, dtype=torch.bool)
        if i < params.get("min_new_tokens", 0):
            allowed[EOS_ID] = False
        late = [asked.prompt[-1], *answer[: i - 1]] if i else []
        scores = [_penalized(row, before, params).where(allowed, -torch.inf) for before in (answer[:i], late)]
        for token, bias in params.get("logit_bias", {}).items():
            for one in scores:
                one[int(token)] += bias
        good = any(one[answer[i]] > one.max() - TOLERANCE for one in scores)
        choices.append(answer[i] if good else int(scores[0].argmax()))
        if grammar is not None:
            grammar.accept(answer[i])
    return choices


def _penalized(row: Tensor, before: Sequence[int], params: dict[str, Any]) -> Tensor:
    counts = torch.bincount(torch.tensor(list(before), dtype=torch.int64), minlength=VOCAB_SIZE)
    row = row - params.get("frequency_penalty", 0.0) * counts - params.get("presence_penalty", 0.0) * (counts > 0)
    repetition = params.get("repetition_penalty", 1.0)
    return torch.where(counts > 0, torch.where(row < 0, row * repetition, row / repetition), row)


class Grammar:
    """A regex or a JSON schema, run beside the answer by xgrammar itself."""

    def __init__(self, model: Path, *, regex: str | None = None, json_schema: str | None = None):
        import xgrammar
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID])
        compiler = xgrammar.GrammarCompiler(info)
        compiled = compiler.compile_regex(regex) if regex else compiler.compile_json_schema(json_schema)
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._mask = xgrammar.allocate_token_bitmask(1, VOCAB_SIZE)

    def allowed(self) -> Tensor:
        """The tokens that may follow: bool `[vocabulary]`."""
        self._matcher.fill_next_token_bitmask(self._mask)
        bits = self._mask[0].view(-1, 1) >> torch.arange(32)
        return (bits & 1).bool().flatten()[:VOCAB_SIZE]

    def accept(self, token: int) -> None:
        assert self._matcher.accept_token(token), f"token {token} breaks the grammar"
