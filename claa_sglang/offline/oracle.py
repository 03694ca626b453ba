"""The Answer-Informed Oracle: which prompt tokens the model looks at while it gives its own answer.

A reference for rankings, not a method: it needs the answer. Source: arXiv 2602.16054; the authors' code in
BradMcDanel/kv-exps, FastKV/analysis/generate_oracles.py and FastKV/baseline/oracle. They differ from each other in
small ways; here the last prompt token's query is the first step, and the mean is pooled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from claa_sglang.offline import records
from claa_sglang.offline.basics import MAX_ANSWER_TOKENS
from claa_sglang.offline.capture import greedy_answer

POOL_KERNEL = 13
_KIND = "oracle"


class AnswerAttention:
    """Observer (`capture.Observer`) that folds each step's attention to the prompt into one row.

    A step is a forward; its query is the forward's last row: the last prompt token, then each answer token fed back.
    With p[t, l, h] = softmax(scaling * q k^T) over the prompt's keys only, in fp32 [N]:
        `importance = pool_mean(mean over steps t of max over layers l, query heads h of pool_each(p[t, l, h]))`.
    The pools are averages over positions, stride 1, zero padding counted, of odd kernels; a kernel of 1 does nothing.
    The oracle pools the mean with 13; SpecPrefill pools each p instead.
    Keeps [steps, N]; nothing of a layer outlives its call.
    """

    def __init__(self, prompt_tokens: int, *, pool_each: int = 1, pool_mean: int = POOL_KERNEL) -> None:
        self._prompt_tokens, self._pool_each, self._pool_mean = prompt_tokens, pool_each, pool_mean
        self._rows: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, scaling: float) -> None:
        probabilities = prompt_attention(q[-1], k[: self._prompt_tokens], scaling=scaling)
        row = _average(probabilities, self._pool_each).amax(dim=0)
        if layer == 0:
            self._rows.append(row)
        else:
            torch.maximum(self._rows[-1], row, out=self._rows[-1])

    def importance(self) -> Tensor:
        """fp32 [N] on the CPU, of the steps so far (at least one)."""
        mean = torch.stack(self._rows).mean(dim=0, keepdim=True).cpu()
        return _average(mean, self._pool_mean)[0]


def prompt_attention(q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
    """q [heads, d], k [N, kv_heads, d], post-RoPE -> fp32 [heads, N], softmax over the N keys."""
    heads, dim = q.shape
    _, kv_heads, _ = k.shape
    grouped = q.float().view(kv_heads, heads // kv_heads, dim) * scaling
    logits = torch.bmm(grouped, k.float().permute(1, 2, 0))
    return torch.softmax(logits, dim=-1).flatten(0, 1)


def _average(rows: Tensor, kernel: int) -> Tensor:
    return F.avg_pool1d(rows, kernel, stride=1, padding=kernel // 2, count_include_pad=True)


@dataclass(frozen=True)
class Oracle:
    """The oracle of one prompt.

    Attributes:
        importance: fp32 [N] on the CPU, one value per prompt token, the window's included.
        answer: ids of the greedy answer.
    """

    about: records.Subject
    importance: Tensor
    answer: tuple[int, ...]

    def save(self, path: Path) -> None:
        records.save(path, self.about, self.answer, {"importance": self.importance})


def answer_informed(model: Any, input_ids: Tensor, *, max_answer_tokens: int = MAX_ANSWER_TOKENS) -> Oracle:
    """Prefill, answer greedily, and rank the prompt by what the answer looked at.

    model: a transformers causal LM of full attention, on any device; input_ids: int64 [N]; max_answer_tokens: where the
    answer is cut. Memory beside the model's own KV cache is linear in N (see `greedy_answer`).
    """
    observer = AnswerAttention(input_ids.numel())
    answer = greedy_answer(model, input_ids, observer, max_answer_tokens=max_answer_tokens)
    return Oracle(_about(model, input_ids, max_answer_tokens), observer.importance(), answer)


def load(path: Path, model: Any, input_ids: Tensor, *, max_answer_tokens: int = MAX_ANSWER_TOKENS) -> Oracle:
    """Read what `Oracle.save` wrote; raises RecordError if it is of another model, prompt or answer length."""
    about = _about(model, input_ids, max_answer_tokens)
    answer, tensors = records.load(path, about)
    return Oracle(about, tensors["importance"], answer)


def _about(model: Any, input_ids: Tensor, max_answer_tokens: int) -> records.Subject:
    return records.subject(_KIND, model, input_ids, max_answer_tokens=max_answer_tokens)
