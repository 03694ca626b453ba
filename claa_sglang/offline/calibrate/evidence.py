"""Studies of many prompts as a few tensors, and what any ranking of their tokens would keep.

One sort of a ranking answers for every keep rate: the mass kept at a budget is a running sum in ranking order. So a
set of scored layers is judged on all prompts and all rates in a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from claa_sglang.config.budget import kept_count
from claa_sglang.offline.study import PromptStudy
from claa_sglang.ranking.rankers import Claa
from claa_sglang.ranking.selection import select


class Kept(NamedTuple):
    """What is kept of P prompts at R keep rates, fp32 [R, P] each.

    mass: of the oracle, as a share of what the oracle keeps at the reference rate.
    recall: share of needle tokens; NaN for a prompt without known needles.
    """

    mass: Tensor
    recall: Tensor


@dataclass(frozen=True)
class Evidence:
    """P prompts with at most M tokens that can still be ranked, padded at the end.

    Attributes:
        scores: fp32 [P, L, M], CLAA's score of a token by one layer: the largest z-score over KV heads. A ranking by
            several layers is their maximum. Padding is -inf.
        oracle: fp32 [P, M], share of the prompt's oracle mass. Padding is 0.
        needles: fp32 [P, M], share of the prompt's needle tokens; all 0 where none are known.
        window_oracle, window_needles: fp32 [P], the same of the window, which every choice keeps.
        reference: fp32 [P], oracle mass that the oracle keeps at the reference rate, window included.
        tokens: N of each prompt; keep rates are shares of it. window: tokens at the end that are always kept.
        ranker: what made the scores; it makes those of late layers too.
    """

    scores: Tensor
    oracle: Tensor
    needles: Tensor
    window_oracle: Tensor
    window_needles: Tensor
    reference: Tensor
    tokens: tuple[int, ...]
    window: int
    ranker: Claa

    @property
    def layers(self) -> int:
        return self.scores.shape[1]

    def ranking(self, layers: Sequence[int]) -> Tensor:
        """fp32 [P, M]: the ranking by these layers (at least one), as `ranking.rank` folds them."""
        return self.scores[:, list(layers)].amax(dim=1)

    def kept(self, ranking: Tensor, rates: Sequence[float]) -> Kept:
        """What the best of `ranking`, [P, M], keep at each rate, with `ranking.select`'s order."""
        order = torch.sort(ranking, dim=1, descending=True, stable=True).indices
        counts = torch.tensor([self.counts(rate) for rate in rates])

        def total(shares: Tensor, window: Tensor) -> Tensor:
            running = shares.gather(1, order).cumsum(dim=1)
            running = torch.cat((torch.zeros_like(running[:, :1]), running), dim=1)
            return window + running.gather(1, counts.T.clamp(max=ranking.shape[1])).T

        recall = total(self.needles, self.window_needles)
        known = self.needles.sum(dim=1) + self.window_needles > 0
        return Kept(total(self.oracle, self.window_oracle) / self.reference, recall.masked_fill(~known, float("nan")))

    def counts(self, rate: float) -> list[int]:
        """Ranked tokens that each prompt keeps at `rate`: what is left of its budget after the window."""
        return [kept_count(n, rate, self.window) - min(n, self.window) for n in self.tokens]

    def positions(self, ranking: Tensor, rate: float) -> list[Tensor]:
        """For each prompt the ranked tokens kept, int64 ascending; indices into M."""
        best = torch.sort(ranking, dim=1, descending=True, stable=True).indices
        return [row[:count].sort().values for row, count in zip(best, self.counts(rate), strict=True)]

    def after(self, kept: Sequence[Tensor], scores: Sequence[Tensor]) -> Evidence:
        """What is left after a prune that kept the positions `kept` (indices into M) of each prompt.

        scores: of each prompt, fp32 [L, kept], by layers that see the kept tokens only. Rates stay shares of N.
        """
        return Evidence(
            _padded(scores, float("-inf")),
            _padded([row[i] for row, i in zip(self.oracle, kept, strict=True)], 0.0),
            _padded([row[i] for row, i in zip(self.needles, kept, strict=True)], 0.0),
            self.window_oracle,
            self.window_needles,
            self.reference,
            self.tokens,
            self.window,
            self.ranker,
        )


def gather(
    studies: Sequence[PromptStudy], needles: Sequence[Tensor], reference_rate: float, ranker: Claa | None = None
) -> Evidence:
    """Evidence of studied prompts (at least one, of one model and window).

    needles: of each prompt, bool [N]. reference_rate: budget at which the oracle's own mass is the measure.
    ranker: what a server runs; default: CLAA at its defaults.
    """
    window, ranker = studies[0].window, ranker or Claa()
    oracles = [study.oracle / study.oracle.sum() for study in studies]
    marked = [tokens.float() / tokens.sum().clamp(min=1) for tokens in needles]
    return Evidence(
        _padded([fold(study.statistics["window_mass"], ranker) for study in studies], float("-inf")),
        _padded([oracle[:-window] for oracle in oracles], 0.0),
        _padded([marks[:-window] for marks in marked], 0.0),
        torch.stack([oracle[-window:].sum() for oracle in oracles]),
        torch.stack([marks[-window:].sum() for marks in marked]),
        torch.stack([_best_mass(oracle, reference_rate, window) for oracle in oracles]),
        tuple(study.tokens for study in studies),
        window,
        ranker,
    )


def fold(window_mass: Tensor, ranker: Claa) -> Tensor:
    """fp32 [L, kv_heads, M] of `rankers.window_mass` -> [L, M]: each layer's own ranking."""
    return torch.stack([ranker.rank([layer]) for layer in window_mass])


def _best_mass(oracle: Tensor, rate: float, window: int) -> Tensor:
    tokens = oracle.numel()
    return oracle[select(oracle[:-window], tokens, kept_count(tokens, rate, window), window)].sum()


def _padded(rows: Sequence[Tensor], value: float) -> Tensor:
    """[P, ..., M] of tensors [..., m], filled up at the end."""
    longest = max(row.shape[-1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[-1]), value=value) for row in rows])
