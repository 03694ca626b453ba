"""One prompt, studied once: everything that rankings of it can be made from and judged by.

A single prefill and a greedy answer give, per layer, every statistic that a ranker folds (rankers.STATISTICS), and the
oracle. Any ranker over any set of layers is then a matter of milliseconds, and no model is needed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from claa_sglang.offline import records
from claa_sglang.offline.basics import MAX_ANSWER_TOKENS, WINDOW, CaptureError
from claa_sglang.offline.capture import greedy_answer
from claa_sglang.offline.oracle import AnswerAttention
from claa_sglang.ranking.rankers import JOINED, STATISTICS, Ranker, Statistic

_KIND = "study-2"  # another number when the statistics change, so that older files are not read as these


@dataclass(frozen=True)
class PromptStudy:
    """What one prompt of N tokens showed, with a window of W, in a model of L layers. All tensors fp32, on the CPU.

    Attributes:
        about: model, prompt, N (`about.tokens`) and options (`window`, `max_answer_tokens`).
        statistics: by the name of the statistic, each as rankers.py defines it, before pooling and folding:
            window_peak [L, kv_heads, N-W]: largest softmax weight from any of the last W queries and the GQA group;
            window_mass [L, kv_heads, N-W]: softmax mass from the last 8 of them, summed over queries and GQA group;
            last_mass [L, kv_heads, N-W]: the same from the last query alone;
            last_logits [L, 1, N-W]: raw logits of the last query, summed over heads, pooled (GemFilter);
            nothing [L, 0, N-W]: for rankers that look at no layer.
        oracle: [N], the Answer-Informed Oracle's importance of every prompt token.
        answer: ids of the model's greedy answer, at most max_answer_tokens, without the end-of-sequence token.
    """

    about: records.Subject
    statistics: dict[Statistic, Tensor]
    oracle: Tensor
    answer: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.about.tokens

    @property
    def window(self) -> int:
        return self.about.options["window"]

    @property
    def layers(self) -> int:
        return self.statistics["window_mass"].shape[0]

    def rank(self, ranker: Ranker, layers: Sequence[int]) -> Tensor:
        """fp32 [N-W]: the ranking that `ranker` makes of these layers (ascending, at least one), as a server would."""
        statistic = self.statistic(ranker.statistic)
        return ranker.rank([statistic[layer] for layer in layers])

    def statistic(self, name: Statistic) -> Tensor:
        """fp32 [L, rows, N-W]: a statistic by its name, also one that is several others."""
        return torch.cat([self.statistics[part] for part in JOINED.get(name, (name,))], dim=1)

    def save(self, path: Path) -> None:
        kept = {str(name): tensor for name, tensor in self.statistics.items() if tensor.numel()}
        records.save(path, self.about, self.answer, {**kept, "oracle": self.oracle})


def study(
    model: Any, input_ids: Tensor, *, window: int = WINDOW, max_answer_tokens: int = MAX_ANSWER_TOKENS
) -> PromptStudy:
    """Study one prompt.

    model: a transformers causal LM of full attention, on any device; input_ids: int64 [N], as the server would be sent
    them (chat template applied), N > window. max_answer_tokens: where the oracle's answer is cut.
    Cost: one prefill, a decode step per answer token, and the statistics (linear in N per layer). Memory beside the
    model and its KV cache is linear in N: about 8 bytes per layer, KV head and token are kept, on the CPU.
    Raises CaptureError for prompts not longer than the window and for models that cannot be observed.
    """
    tokens = input_ids.numel()
    if tokens <= window:
        raise CaptureError(f"prompt of {tokens} tokens with a window of {window}: nothing is ranked; give a longer one")
    stored = {name: statistic for name, statistic in STATISTICS.items() if name not in JOINED}
    parts: dict[Statistic, list[Tensor]] = {name: [] for name in stored}
    answer_attention = AnswerAttention(tokens)

    def observe(layer: int, q: Tensor, k: Tensor, scaling: float) -> None:
        if q.shape[0] > 1:  # the prefill; later forwards have one row
            for name, statistic in stored.items():
                parts[name].append(statistic(q[-window:], k, scaling=scaling).cpu())
        answer_attention(layer, q, k, scaling)

    answer = greedy_answer(model, input_ids, observe, max_answer_tokens=max_answer_tokens)
    statistics = {name: torch.stack(layers) for name, layers in parts.items()}
    about = _about(model, input_ids, window, max_answer_tokens)
    return PromptStudy(about, statistics, answer_attention.importance(), answer)


def load_or_study(
    directory: Path,
    model: Any,
    input_ids: Tensor,
    *,
    window: int = WINDOW,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
) -> PromptStudy:
    """The study of this prompt from `directory`, or made now and saved there: long work can be stopped and resumed.

    Raises RecordError for a damaged file.
    """
    about = _about(model, input_ids, window, max_answer_tokens)
    path = directory / about.filename()
    if path.is_file():
        return load(path, about)
    made = study(model, input_ids, window=window, max_answer_tokens=max_answer_tokens)
    made.save(path)
    return made


def load(path: Path, about: records.Subject) -> PromptStudy:
    """Read what `PromptStudy.save` wrote; raises RecordError unless it is about exactly `about`."""
    answer, tensors = records.load(path, about)
    oracle = tensors.pop("oracle")
    statistics: dict[Statistic, Tensor] = {name: tensors[name] for name in STATISTICS if name in tensors}
    layers, _, ranked = statistics["window_mass"].shape
    statistics["nothing"] = torch.empty(layers, 0, ranked)
    return PromptStudy(about, statistics, oracle, answer)


def _about(model: Any, input_ids: Tensor, window: int, max_answer_tokens: int) -> records.Subject:
    return records.subject(_KIND, model, input_ids, window=window, max_answer_tokens=max_answer_tokens)
