"""From studies of prompts to evidence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from claa_sglang.config.budget import kept_count
from claa_sglang.offline.calibrate.evidence import Evidence, padded
from claa_sglang.offline.calibrate.ranker_list import POOL_KERNEL, family
from claa_sglang.offline.study import PromptStudy
from claa_sglang.ranking.rankers import JOINED, Fold, make
from claa_sglang.ranking.selection import select
from claa_sglang.ranking.spec import RankerSpec


def gather(
    studies: Sequence[PromptStudy],
    needed: Sequence[Tensor],
    lengths: Sequence[int],
    reference_rate: float,
    rankers: Sequence[RankerSpec],
    device: torch.device | str = "cpu",
) -> Evidence:
    """Evidence of studied prompts (at least one, of one model and window).

    needed: of each prompt, bool [N], the tokens of its answer. lengths: that each was made for. reference_rate: budget
    at which the oracle's own mass is the measure. rankers: whose rankings will be asked for. device: of the tensors.
    """
    window = studies[0].window
    oracles = [study.oracle / study.oracle.sum() for study in studies]
    totals = torch.tensor([float(marks.sum()) for marks in needed])
    return Evidence(
        folds={
            one: padded([fold(study.statistic(ranker_of(one).statistic), one, device) for study in studies], -torch.inf)
            for one in dict.fromkeys(map(family, rankers))
        },
        oracle=padded([oracle[:-window] for oracle in oracles], 0.0).to(device),
        needed=padded([marks[:-window] for marks in needed], False).to(device),
        window_oracle=torch.stack([oracle[-window:].sum() for oracle in oracles]).to(device),
        window_needed=torch.tensor([float(marks[-window:].sum()) for marks in needed], device=device),
        total_needed=totals.to(device),
        reference=torch.stack([_best_mass(oracle, reference_rate, window) for oracle in oracles]).to(device),
        tokens=tuple(study.tokens for study in studies),
        window=window,
        ranked=tuple(study.tokens - window for study in studies),
        lengths=tuple(lengths),
    )


def ranker_of(spec: RankerSpec) -> Fold:
    """The ranker that a server builds of a spec from `ranker_list.read`."""
    ranker = make(spec, pool_kernel=POOL_KERNEL)
    assert isinstance(ranker, Fold)
    return ranker


def fold(statistic: Tensor, spec: RankerSpec, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [L, rows, M] of the spec's statistic -> [looks, L, M] on `device`: each layer's own ranking, not carried.

    looks: 2 for a ranker that joins two rankings, whose rows lie one under the other; else 1.
    """
    ranker = ranker_of(spec)
    looks = statistic.to(device).chunk(len(JOINED.get(ranker.statistic, (None,))), dim=1)
    return torch.stack([torch.stack([ranker.fold([layer]) for layer in look]) for look in looks])


def _best_mass(oracle: Tensor, rate: float, window: int) -> Tensor:
    tokens = oracle.numel()
    return oracle[select(oracle[:-window], tokens, kept_count(tokens, rate, window), window)].sum()
