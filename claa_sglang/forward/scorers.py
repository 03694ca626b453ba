"""Scores of one prune in one forward: layer after layer in, a ranking per request out.

On a GPU the Triton kernels score all requests of a ranker at once, and the ranking grows in place as layers are folded
in; the log-sum-exp of the queries is theirs, or FlashInfer's. Elsewhere, for rankers that are not in the kernels, and
where it is asked for, request by request in torch. CLAA is `kernels/naive.py` in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from claa_sglang.config.config import ClaaConfig
from claa_sglang.forward.late_view import on_device
from claa_sglang.forward.ranks import Ranks
from claa_sglang.kernels import paged_lse
from claa_sglang.kernels.layout import Row, describe
from claa_sglang.memory.kv_rows import gather
from claa_sglang.ranking.carry import carry
from claa_sglang.ranking.rankers import PAPER_QUERIES, join, make, of_all_heads, row_count
from claa_sglang.ranking.spec import RankerSpec
from claa_sglang.requests.state import RequestState, contain

SCORING = "scoring its prompt"


class Scored(NamedTuple):
    """A request that is about to be pruned.

    Attributes:
        request: its index in the batch.
        first_row: row of its first window token among the queries.
        table_row: row of the request table that lists its tokens' slots.
        tokens: how many of them are ranked or in the window; more than the window.
    """

    request: int
    state: RequestState
    first_row: int
    table_row: int
    tokens: int


class Scorer(Protocol):
    """Of one prune in one forward. Failures end the requests they concern (`Progress.fail`) and raise nothing."""

    def score(self, queries: Tensor, key_buffer: Tensor, scaling: float) -> None:
        """Fold in one layer.

        Args:
            queries: post-RoPE, `[rows, heads, head_dim]`, all rows of the level.
            key_buffer: post-RoPE keys of the layer, `[slots, kv_heads, head_dim]`, this forward's included; of the
                queries' dtype, or 8-bit floats.
            scaling: factor on the logits, with that of 8-bit keys.
        """

    def merge(self, ranks: Ranks) -> None:
        """After the last layer, where there are several ranks: have the scores of all KV heads. Every rank takes part,
        also for requests that it failed to score."""

    def layers(self, request: int) -> list[Tensor]:
        """Of a request that asks to be explained, before `ranking`: fp32 `[tokens - window]` for each scored layer, the
        ranking that it alone would give; none of a ranker that looks at no layer, and if it failed."""

    def ranking(self, request: int) -> Tensor:
        """fp32 `[tokens - window]` of the request at this index in the batch; zeros if it failed."""


class Look(NamedTuple):
    """Which queries of the window score, the last so many, and whether by their largest weight or by the sum."""

    queries: int
    peaks: bool


class KernelRanker(NamedTuple):
    """A ranker that the kernels have.

    looks: one; or two, whose rankings are joined (`rankers.join`). pool_kernel: odd, in tokens. carry: see
    ranking/carry.py.
    """

    looks: tuple[Look, ...]
    pool_kernel: int
    carry: float


def in_kernels(spec: RankerSpec, config: ClaaConfig) -> KernelRanker | None:
    """`spec` as the kernels take it; None if they do not have it."""
    if spec.name not in ("claa", "last-query") or not spec.zscore or spec.heads != "max" or spec.pool != "before":
        return None
    last = Look(queries=1, peaks=False)
    if spec.name == "last-query":
        looks: tuple[Look, ...] = (last,)
    elif spec.queries == "sum":
        looks = (Look(min(PAPER_QUERIES, config.window), peaks=False),)
    else:
        looks = (Look(config.window, peaks=True), *([last] if spec.last else []))
    return KernelRanker(looks, spec.kernel or config.pool_kernel, spec.carry)


def make_scorer(requests: list[Scored], table: Tensor, config: ClaaConfig) -> Scorer:
    """The scorer for the table's device, the configured way and the requests' rankers. requests: at least one.

    An `auto` that `forward/scorer_choice.py` has not replaced by what it measured is Triton's.
    """
    if not table.is_cuda or config.scorer == "torch":
        return TorchScorer(requests, table, config)
    in_triton = FlashInferScorer if config.scorer == "flashinfer" else KernelScorer
    by_ranker: dict[KernelRanker | None, list[Scored]] = {}
    for scored in requests:
        by_ranker.setdefault(in_kernels(scored.state.plan.ranker, config), []).append(scored)
    scorers = [
        (TorchScorer(own, table, config) if ranker is None else in_triton(own, table, config, ranker), own)
        for ranker, own in by_ranker.items()
    ]
    return scorers[0][0] if len(scorers) == 1 else SeveralScorers(scorers)


class SeveralScorers:
    """For a batch whose requests ask for several rankers; see `Scorer`. scorers: each with its requests."""

    def __init__(self, scorers: Sequence[tuple[Scorer, Sequence[Scored]]]) -> None:
        self._scorers = [scorer for scorer, _ in scorers]
        self._of_request = {scored.request: scorer for scorer, own in scorers for scored in own}

    def score(self, queries: Tensor, key_buffer: Tensor, scaling: float) -> None:
        for scorer in self._scorers:
            scorer.score(queries, key_buffer, scaling)

    def merge(self, ranks: Ranks) -> None:
        for scorer in self._scorers:
            scorer.merge(ranks)

    def layers(self, request: int) -> list[Tensor]:
        return self._of_request[request].layers(request)

    def ranking(self, request: int) -> Tensor:
        return self._of_request[request].ranking(request)


class TorchScorer:
    """Request by request, with any ranker; see `Scorer`."""

    def __init__(self, requests: list[Scored], table: Tensor, config: ClaaConfig) -> None:
        self._requests = {scored.request: scored for scored in requests}
        self._rankers = {
            scored.request: make(scored.state.plan.ranker, pool_kernel=config.pool_kernel) for scored in requests
        }
        self._scores: dict[int, list[Tensor]] = {scored.request: [] for scored in requests}
        self._table, self._config = table, config
        self._layers, self._kv_heads = 0, 0

    def score(self, queries: Tensor, key_buffer: Tensor, scaling: float) -> None:
        self._layers, self._kv_heads = self._layers + 1, key_buffer.shape[1]
        for scored in self._requests.values():
            with contain([scored.state], SCORING):
                rows = slice(scored.first_row, scored.first_row + self._config.window)
                keys = gather(key_buffer, self._table[scored.table_row, : scored.tokens], queries.dtype)
                ranker = self._rankers[scored.request]
                self._scores[scored.request].append(ranker.score_layer(queries[rows], keys, scaling=scaling))

    def merge(self, ranks: Ranks) -> None:
        shapes = []
        for scored in self._requests.values():
            rows = row_count(self._rankers[scored.request].statistic, self._kv_heads)
            shape, scores = (rows, scored.tokens - self._config.window), self._scores[scored.request]
            # One that failed here has fewer: its scores count for nothing, but their places must be there.
            scores += [torch.zeros(shape, device=self._table.device)] * (self._layers - len(scores))
            shapes += [shape] * self._layers
        mine = torch.cat([layer.reshape(-1) for scores in self._scores.values() for layer in scores])
        if not mine.numel():
            return
        sizes = [rows * tokens for rows, tokens in shapes]
        parts = [rank.split(sizes) for rank in ranks.gather(mine)]
        layers = iter([[p.view(shape) for p in part] for *part, shape in zip(*parts, shapes, strict=True)])
        for request, scores in self._scores.items():
            statistic = self._rankers[request].statistic
            self._scores[request] = [of_all_heads(statistic, next(layers)) for _ in scores]

    def layers(self, request: int) -> list[Tensor]:
        scored, ranker = self._requests[request], self._rankers[request]
        found: list[Tensor] = []
        with contain([scored.state], "explaining its prompt"):
            if ranker.statistic != "nothing":
                found = [ranker.rank([layer]) for layer in self._scores[request]]
        return found

    def ranking(self, request: int) -> Tensor:
        scored = self._requests[request]
        ranking = torch.zeros(scored.tokens - self._config.window, device=self._table.device)
        with contain([scored.state], "ranking its prompt"):
            ranking = self._rankers[request].rank(self._scores.pop(request))
        return ranking


class KernelScorer:
    """One ranker for all its requests at once; see `Scorer`.

    Five launches for each layer and look, and nothing waits for the GPU.
    """

    def __init__(self, requests: list[Scored], table: Tensor, config: ClaaConfig, ranker: KernelRanker) -> None:
        self._requests, self._table, self._config, self._ranker = requests, table, config, ranker
        self._first_layer = True
        counts = [scored.tokens - config.window for scored in requests]
        first_rows, table_rows = [s.first_row for s in requests], [s.table_row for s in requests]
        described = describe(first_rows, table_rows, [s.tokens for s in requests], config.window)
        self._spans = {
            scored.request: slice(start, start + count)
            for scored, start, count in zip(requests, described[Row.BEFORE], counts, strict=True)
        }
        self._max_tokens = max(scored.tokens for scored in requests)
        self._described = on_device(described, torch.int32, table.device)
        self._rankings = torch.zeros(len(ranker.looks), sum(counts), device=table.device)
        # As _rankings, of each layer alone; empty where nobody asks to be explained.
        self._is_explained = any(scored.state.plan.options.explain for scored in requests)
        self._layers: list[Tensor] = []

    def score(self, queries: Tensor, key_buffer: Tensor, scaling: float) -> None:
        with contain([scored.state for scored in self._requests], SCORING):
            if self._is_explained:
                self._layers.append(torch.zeros_like(self._rankings))
            for index in range(len(self._ranker.looks)):
                mass = self.mass(index, queries, key_buffer, scaling)
                self.fold(index, mass, self._first_layer)
                if self._is_explained:
                    self._fold(self._layers[-1][index], mass, first_layer=True)
            self._first_layer = False

    def mass(self, look: int, queries: Tensor, key_buffer: Tensor, scaling: float) -> Tensor:
        """What one layer's queries look at, not pooled: fp32 `[kv_heads * positions of all requests]`.

        look: index of the ranker's.
        """
        from claa_sglang.kernels.window_attention import window_mass

        return window_mass(
            queries,
            key_buffer,
            self._table,
            self._described,
            window=self._config.window,
            scaling=scaling,
            max_tokens=self._max_tokens,
            positions=self._rankings.shape[1],
            queries=self._ranker.looks[look].queries,
            peaks=self._ranker.looks[look].peaks,
            lse=self.lse(look, queries, key_buffer, scaling),
        )

    def lse(self, look: int, queries: Tensor, key_buffer: Tensor, scaling: float) -> Tensor | None:
        """The log-sum-exp of a look's queries, as `window_mass` takes it; None leaves it to the kernels."""
        return None

    def fold(self, look: int, mass: Tensor, first_layer: bool) -> None:
        """Fold one layer's mass into the rankings of a look; those of a first layer replace what they hold."""
        self._fold(self._rankings[look], mass, first_layer)

    def _fold(self, rankings: Tensor, mass: Tensor, first_layer: bool) -> None:
        from claa_sglang.kernels.fold import fold

        fold(
            mass,
            self._described,
            rankings,
            window=self._config.window,
            pool_kernel=self._ranker.pool_kernel,
            max_tokens=self._max_tokens,
            first_layer=first_layer,
        )

    def merge(self, ranks: Ranks) -> None:
        # z-scores are of one KV head each, so the ranking over all of them is the largest of any rank's.
        ranks.largest(self._rankings)

    def layers(self, request: int) -> list[Tensor]:
        return [self._of(request, layer) for layer in self._layers]

    def ranking(self, request: int) -> Tensor:
        return self._of(request, self._rankings)

    def _of(self, request: int, rankings: Tensor) -> Tensor:
        """fp32 `[tokens - window]` of one request, of the looks' rankings of all."""
        folded, *others = (ranking[self._spans[request]] for ranking in rankings)
        if others:
            return join(folded, others[0], self._ranker.carry)
        return carry(folded, self._ranker.carry) if self._ranker.carry else folded


class FlashInferScorer(KernelScorer):
    """A KernelScorer whose log-sum-exp is FlashInfer's, from one plan for each look; see `Scorer`.

    Types and head sizes that FlashInfer has no kernel for are left to Triton.
    """

    def __init__(self, requests: list[Scored], table: Tensor, config: ClaaConfig, ranker: KernelRanker) -> None:
        super().__init__(requests, table, config, ranker)
        self._plans: dict[int, paged_lse.PagedLse] = {}  # of each look, from its first layer on

    def lse(self, look: int, queries: Tensor, key_buffer: Tensor, scaling: float) -> Tensor | None:
        _, heads, head_dim = queries.shape
        if not paged_lse.takes(queries.dtype, head_dim):
            return None
        if look not in self._plans:
            self._plans[look] = paged_lse.PagedLse(
                self._table,
                [scored.first_row for scored in self._requests],
                [scored.table_row for scored in self._requests],
                [scored.tokens for scored in self._requests],
                window=self._config.window,
                queries=self._ranker.looks[look].queries,
                heads=heads,
                kv_heads=key_buffer.shape[1],
                head_dim=head_dim,
                dtype=queries.dtype,
            )
        return self._plans[look](queries, key_buffer, scaling)
