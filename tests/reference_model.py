"""The CLAA answer from transformers' own modules: nothing of SGLang, and nothing of this project.

One plain forward of the model over prompt and answer, without a cache, in which the late layers are handed the kept
rows only. The model runs its own code: hooks on its layers take the attention weights of the scored layers, and cut
rows, positions and mask before the first late layer. An answer is checked with the tokens the server gave (a causal
model shows at once what it would say after each of them): if every token is the reference's first choice after those
before it, then greedy decoding of the reference gives the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Expected:
    """What the reference says.

    Attributes:
        kept: kept prompt positions, ascending.
        logprobs: fp32 `[answer tokens, vocabulary]`: row i is the distribution after the prompt and i answer tokens.
        margin: distance between the worst token kept for its rank and the best one dropped, in ranking units (infinite
            where none was dropped). Near 0, other arithmetic may choose another token with equal right.
    """

    kept: list[int]
    logprobs: Tensor
    margin: float

    @property
    def tokens(self) -> list[int]:
        """First choice at every position: the greedy answer if it equals the answer the pass was made with."""
        return self.logprobs.argmax(-1).tolist()


class ReferenceModel:
    """A model on disk, in float32 with eager attention, and the CLAA settings to run it with."""

    def __init__(
        self,
        path: Path,
        *,
        prune_layer: int,
        score_layers: Sequence[int],
        window: int = 8,
        pool_kernel: int = 7,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.prune_layer = prune_layer
        self.score_layers = tuple(score_layers)
        self.window = window
        self.pool_kernel = pool_kernel

    def dense(self, prompt: Sequence[int], answer: Sequence[int]) -> Expected:
        """As `pruned`, with every token in every layer."""
        return Expected(list(range(len(prompt))), self._forward([*prompt, *answer[:-1]])[-len(answer) :], float("inf"))

    def pruned(self, prompt: Sequence[int], answer: Sequence[int], keep_rate: float) -> Expected:
        """The reference's view of `answer`, which follows `prompt`, when `keep_rate` of the prompt is kept."""
        run = _PrunedRun(self, len(prompt), len(answer) - 1, keep_rate)
        layers = self.model.model.layers
        hooks = [layers[i].self_attn.register_forward_hook(run.take_weights) for i in self.score_layers]
        for layer in layers[self.prune_layer + 1 :]:
            hooks.append(layer.register_forward_pre_hook(run.cut, with_kwargs=True))
        try:
            logprobs = self._forward([*prompt, *answer[:-1]])
        finally:
            for hook in hooks:
                hook.remove()
        assert run.kept is not None and logprobs.shape[0] == len(run.kept) + len(answer) - 1
        return Expected(run.kept, logprobs[-len(answer) :], run.margin)

    @torch.no_grad()
    def _forward(self, tokens: Sequence[int]) -> Tensor:
        logits = self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)


class _PrunedRun:
    """One forward: weights taken, kept rows chosen, late layers cut."""

    def __init__(self, reference: ReferenceModel, prompt: int, generated: int, keep_rate: float) -> None:
        self.reference = reference
        self.prompt = prompt
        self.generated = generated
        self.count = min(prompt, max(int(keep_rate * prompt), reference.window))
        self.rows: list[Tensor] = []  # z-scores, [1, prompt - window] each
        self.kept: list[int] | None = None
        self.margin = float("inf")

    def take_weights(self, attention: Any, _args: Any, output: Any) -> None:
        """After a scored layer's attention: its weights are `[1, heads, rows, rows]`, softmax done."""
        ranked, kernel = self.prompt - self.reference.window, self.reference.pool_kernel
        weights = output[1][0].double()[:, ranked : self.prompt, :ranked]  # what the window gives to the others
        padded = torch.nn.functional.pad(weights.sum(1), (kernel // 2, kernel // 2))
        pooled = padded.unfold(1, kernel, 1).mean(-1)
        group = attention.num_key_value_groups
        for head in pooled.view(-1, group, ranked).sum(1):
            deviation = head.std() if ranked > 1 else torch.tensor(torch.inf)
            self.rows.append((head - head.mean()) / (deviation + 1e-8))

    def cut(self, _layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a late layer: only kept prompt rows and generated rows, at their own positions."""
        if self.kept is None:
            self._choose()
            # Later layers get these rows already.
            args = (args[0][:, self._index], *args[1:])
        size = len(self._index)
        mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]
        cosine, sine = kwargs["position_embeddings"]
        return args, {
            **kwargs,
            "attention_mask": mask,
            "position_ids": kwargs["position_ids"][:, self._index],
            "position_embeddings": (cosine[:, self._index], sine[:, self._index]),
        }

    def _choose(self) -> None:
        ranked = self.prompt - self.reference.window
        best = torch.stack(self.rows).amax(0).tolist()
        order = sorted(range(ranked), key=lambda position: (-best[position], position))
        take = self.count - self.reference.window
        if 0 < take < ranked:
            self.margin = best[order[take - 1]] - best[order[take]]
        self.kept = sorted(order[:take]) + list(range(ranked, self.prompt))
        self._index = torch.tensor(self.kept + list(range(self.prompt, self.prompt + self.generated)))
