"""How good rankings of one prompt are, held against the Answer-Informed Oracle."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from claa_sglang.config.budget import kept_count
from claa_sglang.offline.basics import CaptureError
from claa_sglang.offline.study import PromptStudy
from claa_sglang.ranking.selection import select


class Measures(NamedTuple):
    """Of R rankings of one prompt, each fp64 [R].

    Attributes:
        rho: Spearman's rank correlation with the oracle, over the N-W tokens before the window (scipy); -1 to 1. Most
            of it is decided by tokens that nobody keeps.
        recall: of the tokens before the window that the oracle keeps at the budget, the share that the ranking keeps.
            The first token is one of them, and always kept.
        mass: share of the oracle's total importance (all N tokens) that lies on kept tokens, the window's included.
        answer: share of `needed` tokens that are kept; NaN where none are known.
    """

    rho: np.ndarray
    recall: np.ndarray
    mass: np.ndarray
    answer: np.ndarray


def measure(study: PromptStudy, rankings: Tensor, keep_rate: float, needed: Tensor | None = None) -> Measures:
    """Compare rankings, fp32 [R, N-W], with the oracle of the same prompt, at a budget of keep_rate * N tokens.

    needed: bool [N], the tokens of the prompt that the answer repeats (`samples.Sample.used`), if they are known.
    NaN in a ranking counts as -inf, as in `select`. Raises CaptureError where the budget is the window alone.
    """
    oracle, window, tokens = study.oracle, study.window, study.tokens
    kept = kept_count(tokens, keep_rate, window)
    if kept <= window:
        raise CaptureError(
            f"a prompt of {tokens} tokens at keep rate {keep_rate} keeps its window of {window} and nothing else; give "
            "longer prompts or a higher keep rate"
        )
    before = oracle[: tokens - window]
    best = select(before, tokens, kept, window)[: kept - window]
    ours = torch.stack([select(ranking, tokens, kept, window) for ranking in rankings])  # [R, kept], the window last
    repeated = torch.zeros(tokens) if needed is None else needed.double()
    ranked = rankings.masked_fill(rankings.isnan(), -torch.inf).numpy()
    return Measures(
        rho=stats.spearmanrho(ranked, before.numpy()[None], axis=-1).statistic,
        recall=torch.isin(ours[:, : kept - window], best).double().mean(dim=1).numpy(),
        mass=(oracle.double()[ours].sum(dim=1) / oracle.double().sum()).numpy(),
        answer=(repeated[ours].sum(dim=1) / repeated.sum()).numpy(),  # 0 / 0 is NaN
    )
