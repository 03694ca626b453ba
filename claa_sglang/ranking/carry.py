"""Keep whole what an answer copies: a strong token carries those after it.

The end of a prompt looks at the beginning of what it is about to copy, and hardly at the rest of it. So what follows a
token that ranks high is kept with it, the longer the higher it ranks. Ours, not the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from claa_sglang.ranking.selection import by_rank


def carry(ranking: Tensor, loss: float) -> Tensor:
    """Raise every token to what the tokens before it carry.

    ranking: fp32 [M], M > 0, higher is more important, in the order of the prompt; ties and NaN as in `select`.
    loss: per token of distance, 0 or more; with 0 everything after the best token is as good as it.
    Returns fp32 [M]:
        `max over j <= i of (u(j) - loss * (i - j))`, u(i) = ln(M / rank(i)), the best token's rank 1.

    A rank has no scale, so one loss serves prompts of every length and layers of every spread: the best of M tokens
    carries at most ln(M) / loss tokens, 450 of 8,192 at 0.02, and the best at a keep rate r carry ln(1 / r) / loss
    fewer. Deterministic; does not wait for the GPU. Sums run in fp64: positions times the loss need its digits.
    """
    at = torch.arange(ranking.shape[0], dtype=torch.float64, device=ranking.device)
    return (torch.cummax(_places(ranking) + loss * at, dim=0).values - loss * at).float()


def places(ranking: Tensor) -> Tensor:
    """fp32 [M]: u(i) = ln(M / rank(i)) of a ranking, fp32 [M]: the same order, on the scale that `carry` has.

    So two rankings of one prompt can be joined by their larger value, whatever their units.
    """
    return _places(ranking).float()


def _places(ranking: Tensor) -> Tensor:
    count = ranking.shape[0]
    place = torch.arange(1, count + 1, dtype=torch.float64, device=ranking.device)
    strength = torch.empty_like(place)
    strength[by_rank(ranking)] = -torch.log(place / count)
    return strength
