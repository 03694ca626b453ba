"""Rankers of prompt tokens behind one interface: the same code in the server and in an offline study.

Score, select and move are three things. A ranker scores: first each scored layer by itself (`score_layer`), then all
of them into one ranking (`rank`). `selection.select` makes positions of a ranking and a budget; forward/late_pass.py
moves rows.

`score_layer` computes one of a few *statistics* of a layer's attention, before any pooling or folding. Rankers with the
same statistic differ in `rank` alone, so a study stores each statistic once and ranks as often as it likes.
The same rankers with plain loops are tests/naive_rankers.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from claa_sglang.kernels.scoring import window_peaks, window_scores
from claa_sglang.ranking import selection
from claa_sglang.ranking.carry import carry, places
from claa_sglang.ranking.spec import CARRY, RankerSpec

GEMFILTER_POOL = 5
SINKS = 4  # tokens at the start that Uniform always prefers
PAPER_QUERIES = 8  # queries that CLAA and FastKV read, as published

Statistic = Literal["window_peak", "window_mass", "last_mass", "peak_and_last", "last_logits", "nothing"]


class Ranker(Protocol):
    """Ranks the prompt tokens before the window. Device-agnostic; no call waits for the GPU, but Uniform's copy.

    statistic: names the function in STATISTICS that `score_layer` is.
    """

    @property
    def statistic(self) -> Statistic: ...

    def score_layer(self, q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
        """Score one layer.

        q: [W, heads, d] post-RoPE queries of the last W prompt tokens; k: [N, kv_heads, d] post-RoPE keys of the
        prompt, N > W. scaling: factor on the logits. Returns fp32 [rows, N-W]; rows are KV heads, or fewer.
        """

    def rank(self, scores: Sequence[Tensor]) -> Tensor:
        """Fold the scores of the scored layers (at least one, in layer order) into one ranking.

        Returns fp32 [N-W], higher is more important. NaN stays NaN, which `selection.select` counts as -inf.
        """


def window_peak(q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
    """fp32 [kv_heads, N-W]: largest softmax weight that a token gets from any query of the window and GQA group.

    A token of the question looks at what it names, and the end of the prompt need not look there again. A sum over the
    window drowns that one look in what all its queries do; a maximum keeps it.
    """
    return window_peaks(q, k, scaling=scaling)


def window_mass(q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
    """fp32 [kv_heads, N-W]: softmax mass each token gets from the last 8 queries, summed over them and the GQA group.

    Steps 1, 2 and 4 of CLAA, without the pooling: `scoring.window_scores` with a pool of 1. Of a window of fewer than 8
    tokens, all of them. The softmax is over all N keys; the window's columns are dropped.
    """
    queries = q[-PAPER_QUERIES:]
    return window_scores(queries, k, scaling=scaling, pool_kernel=1)[:, : k.shape[0] - q.shape[0]]


def last_mass(q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
    """fp32 [kv_heads, N-W]: softmax mass each token gets from the last query alone, summed over the GQA group.

    The softmax is over all N keys; the window's columns are dropped as in `window_mass`.
    """
    return window_scores(q[-1:], k, scaling=scaling, pool_kernel=1)[:, : k.shape[0] - q.shape[0]]


def peak_and_last(q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
    """fp32 [2 * kv_heads, N-W]: the rows of `window_peak`, then those of `last_mass`."""
    return torch.cat((window_peak(q, k, scaling=scaling), last_mass(q, k, scaling=scaling)))


def last_logits(q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
    """fp32 [1, N-W]: raw q.k of the last query, summed over heads, then averaged over 5 positions.

    As published the average runs over all N keys, zero padding counted; only then the window is dropped. `scaling` is
    ignored: a positive factor does not change an order.
    """
    window, heads, dim = q.shape
    tokens, kv_heads, _ = k.shape
    grouped = (
        q[-1].float().view(kv_heads, heads // kv_heads, dim).sum(dim=1)
    )  # the sum over heads of q.k is linear in q
    logits = torch.einsum("hd,nhd->n", grouped, k.float())
    return _pool(logits[None], GEMFILTER_POOL)[:, : tokens - window]


def nothing(q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
    """fp32 [0, N-W]: no row; only the number of positions."""
    return torch.empty(0, k.shape[0] - q.shape[0], device=k.device)


STATISTICS: dict[Statistic, Callable[..., Tensor]] = {
    "window_peak": window_peak,
    "window_mass": window_mass,
    "last_mass": last_mass,
    "peak_and_last": peak_and_last,
    "last_logits": last_logits,
    "nothing": nothing,
}


# Statistics that are others, one under the other: a study stores those.
JOINED: dict[Statistic, tuple[Statistic, ...]] = {"peak_and_last": ("window_peak", "last_mass")}
ROWS: dict[Statistic, int] = {"last_logits": 1, "nothing": 0}  # of those that have no row for each KV head


def row_count(statistic: Statistic, kv_heads: int) -> int:
    """Rows of what `score_layer` returns."""
    return ROWS.get(statistic, kv_heads * len(JOINED.get(statistic, (statistic,))))


def of_all_heads(statistic: Statistic, parts: Sequence[Tensor]) -> Tensor:
    """The statistic of a whole layer, fp32 [rows, M], from those of groups of its KV heads, in their order."""
    if statistic == "last_logits":  # a sum over heads
        return torch.stack(list(parts)).sum(dim=0)
    halves = len(JOINED.get(statistic, (statistic,)))
    return torch.cat([part.chunk(halves)[i] for i in range(halves) for part in parts])


class _Scored(ABC):
    """`score_layer` as the statistic that a class names."""

    @property
    @abstractmethod
    def statistic(self) -> Statistic:
        """See `Ranker`."""

    def score_layer(self, q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
        return STATISTICS[self.statistic](q, k, scaling=scaling)


@dataclass(frozen=True, kw_only=True)
class Fold(_Scored):
    """What CLAA makes of the scored layers, whichever queries they were scored with.

    With s[l, h] the statistic of layer l and KV head h:
        `rank = carry(max over l, h of z(pool(s[l, h])))`, z(x) = (x - mean) / (std + 1e-8), unbiased std.

    Switches:
        zscore: False leaves z out; rows of large mass then win.
        heads: "sum" adds the KV heads of a layer before z, leaving it one row: `max over l of z(sum over h of ...)`.
        pool: "after" pools the finished ranking instead of each row.
        pool_kernel: odd, in positions; zero padding counted.
        carry: what follows a strong token is kept with it, see carry.py; 0 leaves that out.
    Which layers, and how many, is the caller's choice of scores.
    """

    zscore: bool = True
    heads: Literal["max", "sum"] = "max"
    pool: Literal["before", "after"] = "before"
    pool_kernel: int = 7
    carry: float = CARRY

    def rank(self, scores: Sequence[Tensor]) -> Tensor:
        folded = self.fold(scores)
        return carry(folded, self.carry) if self.carry else folded

    def fold(self, scores: Sequence[Tensor]) -> Tensor:
        """`rank` before anything is carried: of several layers it is the largest of each one's."""
        rows = [_pool(layer, self.pool_kernel) for layer in scores] if self.pool == "before" else list(scores)
        if self.heads == "sum":
            rows = [layer.sum(dim=0, keepdim=True) for layer in rows]
        folded = selection.rank(rows) if self.zscore else _largest(rows)
        return _pool(folded[None], self.pool_kernel)[0] if self.pool == "after" else folded


def join(peaks: Tensor, last: Tensor, loss: float) -> Tensor:
    """fp32 [M]: the better of a token's places in two rankings, fp32 [M] each; the first carries (0: nothing)."""
    return torch.maximum(carry(peaks, loss) if loss else places(peaks), places(last))


@dataclass(frozen=True, kw_only=True)
class Claa(Fold):
    """CLAA: any layer, any head and any query of the window may speak for a token.

    queries: "max" takes the largest weight of the window's queries (`window_peak`), "sum" the mass of the last 8.
    last: with "max", a token counts by the better of two places: the one it has so, with what is carried, and the one
        that the last query alone gives it. The last query picks many single tokens, as for a chain of names, which
        spans may crowd out. False leaves that place out.
    With queries "sum" and a carry of 0 it is the paper's rule, `claa:paper`, and bit for bit
    `scoring.window_scores` folded by `selection.rank`. Source: arXiv 2602.16054; the authors' BradMcDanel/kv-exps,
    FastKV/baseline/claa. The rest is ours: docs/results/spans.md has what each part brings.
    """

    queries: Literal["max", "sum"] = "max"
    last: bool = True

    @property
    def statistic(self) -> Statistic:
        if self.queries == "sum":
            return "window_mass"
        return "peak_and_last" if self.last else "window_peak"

    def rank(self, scores: Sequence[Tensor]) -> Tensor:
        if self.statistic != "peak_and_last":
            return super().rank(scores)
        halves = [layer.chunk(2) for layer in scores]
        peaks, last = (self.fold([half[i] for half in halves]) for i in (0, 1))
        return join(peaks, last, self.carry)


@dataclass(frozen=True, kw_only=True)
class LastQuery(Fold):
    """CLAA with the last prompt token's query alone.

    The fold is CLAA's, switches included, so that a comparison with CLAA shows what the window brings and nothing else.
    """

    statistic: ClassVar[Statistic] = "last_mass"


@dataclass(frozen=True, kw_only=True)
class FastKV(_Scored):
    """FastKV's token-selective propagation: the last scored layer alone, summed over KV heads, by the last 8 queries.

    `rank = sum over h of pool_7(s[l, h])`, s the `window_mass` of the last scored layer l.
    Source: arXiv 2502.01068; dongwonjo/FastKV, `update_kv` at the TSP layer.
    """

    statistic: ClassVar[Statistic] = "window_mass"

    pool_kernel: int = 7

    def rank(self, scores: Sequence[Tensor]) -> Tensor:
        return _pool(scores[-1].sum(dim=0, keepdim=True), self.pool_kernel)[0]


@dataclass(frozen=True, kw_only=True)
class GemFilter(_Scored):
    """GemFilter's selection: raw logits of the last query in the last scored layer.

    `rank = pool_5(sum over query heads of q[N-1] . k)`, no softmax; see `last_logits`.
    Source: arXiv 2409.17422; SalesforceAIResearch/GemFilter, `standard_dis_index`. Only its ranking: GemFilter then
    runs all layers again on the kept tokens with new positions, which here keep theirs, as with every ranker.
    """

    statistic: ClassVar[Statistic] = "last_logits"

    def rank(self, scores: Sequence[Tensor]) -> Tensor:
        return scores[-1][0]


@dataclass(frozen=True, kw_only=True)
class Uniform(_Scored):
    """The first tokens, the window (which `select` always keeps) and a random sample of the middle: a floor.

    Deterministic in the number of ranked positions, and the same on every device.
    Source: the uniform baseline of BradMcDanel/kv-exps, which keeps the first 64 and the last 256; at the budgets of
    short prompts nothing would be left for the middle, so the first 4 here (attention sinks, arXiv 2309.17453).
    """

    statistic: ClassVar[Statistic] = "nothing"

    def rank(self, scores: Sequence[Tensor]) -> Tensor:
        positions = scores[0].shape[-1]
        values = torch.rand(positions, generator=torch.Generator().manual_seed(positions))
        values[:SINKS] = 1.0
        return values.to(scores[0].device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Given(_Scored):
    """A ranking made elsewhere, such as the oracle's: fp32 [N-W], whatever the layers say."""

    statistic: ClassVar[Statistic] = "nothing"

    ranking: Tensor

    def rank(self, scores: Sequence[Tensor]) -> Tensor:
        positions = scores[0].shape[-1]
        if self.ranking.shape != (positions,):
            raise ValueError(
                f"given ranking {tuple(self.ranking.shape)} does not fit a prompt with {positions} tokens before its "
                "window; give one value for each of them"
            )
        return self.ranking.to(scores[0].device, torch.float32)


# Every ranker by the name it has in a flag: the names of `spec.SWITCHES`, which are written there again as
# configurations are checked without torch. Its fields are its switches there, with `pool_kernel` for `kernel`.
KINDS: dict[str, type[Any]] = {
    "claa": Claa,
    "last-query": LastQuery,
    "fastkv": FastKV,
    "gemfilter": GemFilter,
    "uniform": Uniform,
}


def make(spec: RankerSpec, *, pool_kernel: int = 7) -> Ranker:
    """The ranker that `spec.parse` read. pool_kernel: odd, in positions; a kernel in the spec wins over it.

    Raises KeyError for a name that is not in KINDS.
    """
    kind, kernel = KINDS[spec.name], spec.kernel or pool_kernel
    switches = {
        **{"zscore": spec.zscore, "heads": spec.heads, "pool": spec.pool, "pool_kernel": kernel},
        **{"carry": spec.carry, "queries": spec.queries, "last": spec.last},
    }
    return kind(**{field.name: switches[field.name] for field in fields(kind)})


def _pool(rows: Tensor, kernel: int) -> Tensor:
    """[rows, positions] averaged over positions, stride 1, zero padding counted; as in `window_scores`."""
    return F.avg_pool1d(rows, kernel, stride=1, padding=kernel // 2, count_include_pad=True)


def _largest(layers: Sequence[Tensor]) -> Tensor:
    """Maximum over all rows; a row with a non-finite score counts as -inf, as in `selection.rank`."""
    rows = torch.cat(list(layers))
    return rows.masked_fill(~rows.isfinite().all(dim=-1, keepdim=True), -torch.inf).amax(dim=0)
