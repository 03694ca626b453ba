"""The CLAA answer from transformers' own modules: nothing of SGLang, and nothing of this project.

One plain forward of the model over prompt and answer, without a cache, in which the layers after each prune are handed
the kept rows only. The model runs its own code: hooks on its layers take the attention weights of the scored layers,
and cut rows, positions and mask before the layers after a prune. An answer is checked with the tokens the server gave
(a causal model shows at once what it would say after each of them): if every token is the reference's first choice
after those before it, then greedy decoding of the reference gives the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Later(NamedTuple):
    """A prune after the first one. Its keep rate is a power of the first one's: `log(its own) / log(the first)`."""

    prune_layer: int
    score_layers: Sequence[int]
    power: float


@dataclass(frozen=True)
class Expected:
    """What the reference says.

    Attributes:
        kept: per prune, the kept prompt positions, ascending.
        logprobs: fp32 `[answer tokens, vocabulary]`: row i is the distribution after the prompt and i answer tokens.
        choices: per prune, what the kept positions were chosen by.
        looked_at: of each scored layer of the first prune, fp64 `[prompt - looking]`: the mean weight of a token in the
            attention of the last `looking` prompt tokens, over these and the heads.
    """

    kept: list[list[int]]
    logprobs: Tensor
    choices: list[_Choice] = field(default_factory=list)
    looked_at: dict[int, Tensor] = field(default_factory=dict)

    @property
    def margin(self) -> float:
        """Smallest distance in score between two tokens next to each other in rank whose swap would keep others.

        Infinite where none does. Near 0, other arithmetic may choose another token with equal right. It tries the swaps
        one by one, which takes seconds for a long prompt, so it is worked out when it is asked for.
        """
        return min((choice.margin() for choice in self.choices), default=float("inf"))

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
        later: Sequence[Later] = (),
        window: int = 32,
        pool_kernel: int = 7,
        loss: float = 0.02,
        paper: bool = False,
        decode_dense_layers: int | None = None,
    ) -> None:
        """window: tokens that rank the others. loss: what a token carries to those after it loses per token.

        paper: the paper's rule, `claa:paper`: the sum over the last 8 of the window, nothing carried, and no place by
            the last query alone.
        decode_dense_layers: first layers in which generated tokens see the whole prompt; from there to the first prune
            they see what that kept. None: they see it all.
        """
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.prunes = (Later(prune_layer, score_layers, 1.0), *later)
        self.window = window
        self.pool_kernel = pool_kernel
        self.loss = loss
        self.paper = paper
        self.decode_dense_layers = decode_dense_layers

    def dense(self, prompt: Sequence[int], answer: Sequence[int]) -> Expected:
        """As `pruned`, with every token in every layer."""
        everything = [list(range(len(prompt)))] * len(self.prunes)
        return Expected(everything, self._forward([*prompt, *answer[:-1]])[-len(answer) :])

    def pruned(self, prompt: Sequence[int], answer: Sequence[int], keep_rate: float, looking: int = 0) -> Expected:
        """The reference's view of `answer`, which follows `prompt`, when the first prune keeps `keep_rate` of it.

        looking: last prompt tokens of which it is told what they look at.
        """
        run = _PrunedRun(self, len(prompt), len(answer) - 1, keep_rate, looking=looking)
        logprobs = self._run(run, [*prompt, *answer[:-1]])
        if self.decode_dense_layers is not None:
            # What is kept depends on the prompt alone, and is known now.
            again = _PrunedRun(self, len(prompt), len(answer) - 1, keep_rate, narrowed_to=run.kept[0])
            logprobs = self._run(again, [*prompt, *answer[:-1]])
            assert again.kept == run.kept
        return Expected(run.kept, logprobs[-len(answer) :], run.choices, run.looked_at)

    def _run(self, run: _PrunedRun, tokens: Sequence[int]) -> Tensor:
        layers = self.model.model.layers
        ends = [*(prune.prune_layer for prune in self.prunes[1:]), len(layers) - 1]
        hooks = []
        if run.narrowed_to is not None:
            for layer in layers[self.decode_dense_layers : self.prunes[0].prune_layer + 1]:
                hooks.append(layer.register_forward_pre_hook(run.narrow, with_kwargs=True))
        for step, (prune, end) in enumerate(zip(self.prunes, ends, strict=True)):
            hooks += [layers[i].self_attn.register_forward_hook(run.take_weights) for i in prune.score_layers]
            for layer in layers[prune.prune_layer + 1 : end + 1]:
                hooks.append(layer.register_forward_pre_hook(partial(run.cut, step), with_kwargs=True))
        try:
            logprobs = self._forward(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        assert len(run.kept) == len(self.prunes) and logprobs.shape[0] == len(run.kept[-1]) + run.generated
        return logprobs

    @torch.no_grad()
    def _forward(self, tokens: Sequence[int]) -> Tensor:
        logits = self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)


class _PrunedRun:
    """One forward: weights taken, kept rows chosen, later layers cut."""

    def __init__(
        self,
        reference: ReferenceModel,
        prompt: int,
        generated: int,
        keep_rate: float,
        narrowed_to: list[int] | None = None,
        looking: int = 0,
    ) -> None:
        """narrowed_to: prompt positions that generated tokens see in restricted layers; None without such layers."""
        self.reference = reference
        self.looking, self.looked_at = looking, {}
        self.narrowed_to = narrowed_to
        self.prompt = prompt
        self.generated = generated
        rates = [keep_rate**prune.power for prune in reference.prunes]
        self.counts = [min(prompt, max(int(rate * prompt), reference.window)) for rate in rates]
        # Z-scores for the next prune, [visible - window] each: by the window, and by the last query alone.
        self.rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.by_layer: dict[int, list[list[float]]] = {}  # of the next prune, as `_Choice.scores`, of each layer alone
        self.kept: list[list[int]] = []
        self.choices: list[_Choice] = []

    @property
    def visible(self) -> list[int]:
        """Prompt positions that have rows now."""
        return self.kept[-1] if self.kept else list(range(self.prompt))

    def take_weights(self, attention: Any, _args: Any, output: Any) -> None:
        """After a scored layer's attention: its weights are `[1, heads, rows, rows]`, softmax done."""
        visible, group = len(self.visible), attention.num_key_value_groups
        ranked = visible - self.reference.window
        if ranked == 0:
            return
        by_window, by_last = self.rows
        queries = min(8, self.reference.window) if self.reference.paper else self.reference.window
        weights = output[1][0].double()[:, visible - queries : visible, :ranked]  # what they give to the others
        looks = weights.reshape(-1, group * queries, ranked)
        here = (
            self._normalised(looks.sum(1) if self.reference.paper else looks.amax(1)),
            self._normalised(weights[:, -1].reshape(-1, group, ranked).sum(1)),
        )
        by_window += here[0]
        by_last += here[1]
        self.by_layer[attention.layer_idx] = [torch.stack(rows).amax(0).tolist() for rows in here]
        if self.looking and not self.kept:
            before = visible - self.looking
            self.looked_at[attention.layer_idx] = output[1][0].double()[:, before:visible, :before].mean((0, 1))

    def _normalised(self, heads: Tensor) -> list[Tensor]:
        """Averaged over the pool, then z-scored: `[KV heads, ranked]` to a row per head."""
        kernel, ranked = self.reference.pool_kernel, heads.shape[1]
        padded = torch.nn.functional.pad(heads, (kernel // 2, kernel // 2))
        rows = []
        for head in padded.unfold(1, kernel, 1).mean(-1):
            deviation = head.std() if ranked > 1 else torch.tensor(torch.inf)
            rows.append((head - head.mean()) / (deviation + 1e-8))
        return rows

    def narrow(self, _layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a restricted layer: generated rows see kept prompt rows, and each other."""
        assert self.narrowed_to is not None
        rows = self.prompt + self.generated
        mask = torch.full((rows, rows), torch.finfo(torch.float32).min).triu(1)
        dropped = sorted(set(range(self.prompt)) - set(self.narrowed_to))
        mask[self.prompt :, dropped] = torch.finfo(torch.float32).min
        return args, {**kwargs, "attention_mask": mask[None, None]}

    def cut(self, step: int, _layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a layer after prune `step`: only kept prompt rows and generated rows, at their own positions."""
        if len(self.kept) == step:
            # Later layers get these rows already.
            args = (args[0][:, self._choose(self.counts[step])], *args[1:])
        index = torch.tensor(self.visible + list(range(self.prompt, self.prompt + self.generated)))
        mask = torch.full((len(index), len(index)), torch.finfo(torch.float32).min).triu(1)[None, None]
        cosine, sine = kwargs["position_embeddings"]
        return args, {
            **kwargs,
            "attention_mask": mask,
            "position_ids": kwargs["position_ids"][:, index],
            "position_embeddings": (cosine[:, index], sine[:, index]),
        }

    def _choose(self, count: int) -> Tensor:
        """Choose the prompt tokens that go on; returns the rows that do, of those there are now."""
        visible = self.visible
        ranked = len(visible) - self.reference.window
        scores = [torch.stack(rows).amax(0).tolist() if ranked else [] for rows in self.rows]
        for rows in self.rows:
            rows.clear()
        choice = _Choice(self.reference, scores, max(0, count - self.reference.window - 1), self.by_layer)
        self.by_layer = {}
        self.choices.append(choice)
        # The first token goes on whatever its rank, if there is room beside the window.
        first = [0] if ranked and count > self.reference.window else []
        rows = sorted(first + choice.best(choice.orders)) + list(range(ranked, len(visible)))
        self.kept.append([visible[row] for row in rows])
        return torch.tensor(rows + list(range(len(visible), len(visible) + self.generated)))


@dataclass(frozen=True)
class _Choice:
    """What one prune chooses, besides the first token and the window.

    Attributes:
        scores: of all rows, by the window and by the last query.
        others: how many rows it chooses.
        by_layer: scores of each scored layer alone.
    """

    reference: ReferenceModel
    scores: list[list[float]]
    others: int
    by_layer: dict[int, list[list[float]]] = field(default_factory=dict)

    @property
    def ranking(self) -> list[float]:
        """Of each row, what it is chosen by."""
        return self.scores[0] if self.reference.paper else self._carried(self.orders)

    @property
    def layers(self) -> dict[int, list[float]]:
        """As `ranking`, of each scored layer alone."""
        alone = {layer: _Choice(self.reference, scores, self.others) for layer, scores in self.by_layer.items()}
        return {layer: choice.ranking for layer, choice in alone.items()}

    @property
    def orders(self) -> list[list[int]]:
        """All rows, best first, by the window and by the last query."""
        return [[row for _, row in sorted((-score, row) for row, score in enumerate(look))] for look in self.scores]

    def best(self, orders: Sequence[Sequence[int]]) -> list[int]:
        """So many rows after the first one that are best once the strong have carried those after them.

        A row counts by the better of two places: the one it has so, and the one that the last query gives it.
        orders: as `orders`, or with two rows swapped.
        """
        if self.reference.paper:
            return sorted([row for row in orders[0] if row > 0][: self.others])
        best = self._carried(orders)
        return sorted(sorted(range(1, len(best)), key=lambda row: (-best[row], row))[: self.others])

    def _carried(self, orders: Sequence[Sequence[int]]) -> list[float]:
        order, by_last = orders
        best = _places(order)
        for row in range(1, len(best)):
            best[row] = max(best[row], best[row - 1] - self.reference.loss)
        return [max(pair) for pair in zip(best, _places(by_last), strict=True)]

    def margin(self) -> float:
        """As `Expected.margin`, of this prune alone."""
        orders = self.orders
        ranked = len(orders[0])
        if not 0 < self.others < ranked - 1:
            return float("inf")
        best = self.best(orders)
        gaps = [
            (of_look[order[i]] - of_look[order[i + 1]], look, i)
            for look, (of_look, order) in enumerate(zip(self.scores, orders, strict=True))
            for i in range(ranked - 1)
        ]
        for gap, look, i in sorted(gaps):
            order = orders[look]
            swapped = [*order[:i], order[i + 1], order[i], *order[i + 2 :]]
            if self.best([*orders[:look], swapped, *orders[look + 1 :]]) != best:
                return gap
        return float("inf")


def _places(order: Sequence[int]) -> list[float]:
    """Of each row ln(rows / its rank). order: all rows, best first."""
    places = [0.0] * len(order)
    for place, row in enumerate(order):
        places[row] = math.log(len(order) / (place + 1))
    return places
