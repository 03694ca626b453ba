"""Studies of many prompts as a few tensors, and what any ranking of their tokens would keep.

One sort of a ranking answers for every keep rate: whatever stands no lower than the last token of a budget is kept. So
a ranker and a set of scored layers are judged on all prompts and all rates at once. Where the tensors are, it is
computed: on a GPU if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from claa_sglang.config.budget import kept_count
from claa_sglang.offline.calibrate import ordering
from claa_sglang.offline.calibrate.ranker_list import family
from claa_sglang.ranking.spec import RankerSpec


class Kept(NamedTuple):
    """What is kept of P prompts at R keep rates, on the CPU; fp32 [R, P] where nothing else is said.

    mass: of the oracle, as a share of what the oracle keeps at the reference rate.
    recall: share of the answer's tokens; NaN for a prompt of which they are not known.
    whole: 1 where every token of the answer is kept, else 0; NaN as above.
    least: fp32 [P], the lowest share of a prompt that holds its whole answer, whatever the rates; infinite where a
        first step has lost some of it, NaN as above.
    lengths: int64 [P], the length each prompt was made for.
    """

    mass: Tensor
    recall: Tensor
    whole: Tensor
    least: Tensor
    lengths: Tensor

    def row(self, index: int) -> Kept:
        """One rate of them."""
        one = slice(index, index + 1)
        return self._replace(mass=self.mass[one], recall=self.recall[one], whole=self.whole[one])


def together(several: Sequence[Kept]) -> Kept:
    """Of other prompts at the same rates, as one."""
    return Kept(*(torch.cat(tensors, dim=-1) for tensors in zip(*several, strict=True)))


@dataclass(frozen=True)
class Evidence:
    """P prompts with at most M tokens that can still be ranked, padded at the end.

    Attributes:
        folds: by family of rankers, fp32 [P, looks, L, M]: the score of a token by one layer (`Fold.fold`), nothing
            carried; of a ranker that joins two looks (`rankers.join`) of both. A ranking by several layers is their
            maximum, and what is carried is carried on that: a rank belongs to the finished ranking, not to a layer.
            Padding is -inf.
        oracle: fp32 [P, M], share of the prompt's oracle mass. Padding is 0.
        needed: bool [P, M], tokens of the answer. Padding is False.
        window_oracle, window_needed: fp32 [P], the same of the window, which every choice keeps: share and number.
        total_needed: fp32 [P], tokens of the answer in all of the prompt, lost ones included; 0 where not known.
        reference: fp32 [P], oracle mass that the oracle keeps at the reference rate, window included.
        tokens: N of each prompt; keep rates are shares of it. window: tokens at the end that are always kept.
        ranked: of each prompt, how many of the M tokens it has. lengths: as in `Kept`.
    """

    folds: Mapping[RankerSpec, Tensor]
    oracle: Tensor
    needed: Tensor
    window_oracle: Tensor
    window_needed: Tensor
    total_needed: Tensor
    reference: Tensor
    tokens: tuple[int, ...]
    window: int
    ranked: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def layers(self) -> int:
        return next(iter(self.folds.values())).shape[2]

    def ranking(self, spec: RankerSpec, layers: Sequence[int]) -> Tensor:
        """fp32 [P, M]: the ranking that `spec` makes of these layers (at least one). KeyError if it was not folded."""
        fold = self.folds[family(spec)]
        looks = reduce(torch.maximum, (fold[:, :, layer] for layer in layers)).unbind(dim=1)
        if len(looks) == 1 and not spec.carry:
            return looks[0]
        places = [
            ordering.carried(look, carry, self._strengths, self._ranked)
            for look, carry in zip(looks, (spec.carry or None, None), strict=False)
        ]
        return reduce(torch.maximum, places)

    def kept(self, ranking: Tensor, rates: Sequence[float]) -> Kept:
        """What is kept of `ranking`, [P, M], at each rate: as `selection.select` does, so the first token always."""
        keys = self._keys(ranking)
        last = self._last_kept(ordering.ascending(keys), rates)  # [P, R]
        mass = torch.stack([(self.oracle * (keys <= edge[:, None])).sum(dim=1) for edge in last.T])
        places, known = self._needed_places
        answer = keys.gather(1, places).masked_fill(~known, torch.iinfo(torch.int64).max)
        found = (answer[:, None] <= last[:, :, None]).sum(dim=2).T + self.window_needed
        worst = answer.masked_fill(~known, ordering.FIRST).amax(dim=1, keepdim=True)
        least = ((keys <= worst).sum(dim=1) + self.window) / self._tokens
        lost = self.window_needed + known.sum(dim=1) < self.total_needed
        unknown = self.total_needed == 0
        return Kept(
            ((mass + self.window_oracle) / self.reference).cpu(),
            (found / self.total_needed).masked_fill(unknown, torch.nan).cpu(),
            (found == self.total_needed).float().masked_fill(unknown, torch.nan).cpu(),
            least.masked_fill(lost, torch.inf).masked_fill(unknown, torch.nan).cpu(),
            torch.tensor(self.lengths),
        )

    def counts(self, rate: float) -> list[int]:
        """Ranked tokens that each prompt keeps at `rate`: what is left of its budget after the window."""
        return [kept_count(n, rate, self.window) - min(n, self.window) for n in self.tokens]

    def positions(self, ranking: Tensor, rate: float) -> list[Tensor]:
        """For each prompt the ranked tokens kept, int64 ascending on the CPU; indices into M."""
        best = ordering.positions(ordering.ascending(self._keys(ranking))).cpu()
        return [row[:count].sort().values for row, count in zip(best, self.counts(rate), strict=True)]

    def after(self, kept: Sequence[Tensor], spec: RankerSpec, scores: Sequence[Tensor]) -> Evidence:
        """What is left after a prune that kept the positions `kept` (indices into M) of each prompt.

        scores: of each prompt, fp32 [looks, L, kept], the fold of `spec` by layers that see the kept tokens only.
        Rates stay shares of N, and an answer of which something was dropped stays incomplete.
        """
        device = self.oracle.device
        return replace(
            self,
            folds={family(spec): padded(scores, float("-inf")).to(device)},
            oracle=padded([row[i] for row, i in zip(self.oracle.cpu(), kept, strict=True)], 0.0).to(device),
            needed=padded([row[i] for row, i in zip(self.needed.cpu(), kept, strict=True)], False).to(device),
            ranked=tuple(len(positions) for positions in kept),
        )

    def _keys(self, ranking: Tensor) -> Tensor:
        keys = ordering.keys(ranking)
        keys[:, 0] = ordering.TOKEN_0  # always kept
        return keys

    def _last_kept(self, best: Tensor, rates: Sequence[float]) -> Tensor:
        """int64 [P, R]: the last key of each budget in sorted keys; one below all keys where it is empty."""
        counts = torch.tensor([self.counts(rate) for rate in rates], device=best.device).T.clamp(max=best.shape[1])
        return best.gather(1, (counts - 1).clamp(min=0)).masked_fill(counts == 0, ordering.FIRST)

    @cached_property
    def _ranked(self) -> Tensor:
        return torch.tensor(self.ranked, device=self.oracle.device)

    @cached_property
    def _strengths(self) -> Tensor:
        return ordering.strengths(self._ranked, self.oracle.shape[1])

    @cached_property
    def _tokens(self) -> Tensor:
        return torch.tensor(self.tokens, device=self.oracle.device)

    @cached_property
    def _needed_places(self) -> tuple[Tensor, Tensor]:
        """int64 [P, K]: where each prompt's answer is, and bool [P, K]: which of them are not padding; K at least 1."""
        count = self.needed.sum(dim=1)
        most = max(1, int(count.max()))
        # Stable, so needed ones first; only made once.
        places = self.needed.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        return places, torch.arange(most, device=count.device) < count[:, None]


def padded(rows: Sequence[Tensor], value: float | bool) -> Tensor:
    """[P, ..., M] of tensors [..., m], filled up at the end."""
    longest = max(1, *(row.shape[-1] for row in rows))
    return torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[-1]), value=value) for row in rows])
