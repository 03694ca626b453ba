"""How many tokens a ranking must keep until all that an answer copies are among them."""

from __future__ import annotations

import torch
from torch import Tensor

from claa_sglang.ranking.selection import by_rank


def minimal_kept(ranking: Tensor, needed: Tensor, window: int) -> int:
    """The smallest `kept` with which `selection.select` keeps every needed token.

    ranking: fp32 [N-W], as `select` takes it, N-W > 0. needed: bool [N], at least one. window: W, in tokens.
    Returns W to N. Needed tokens of the window cost nothing; the first token is kept before any other.
    Raises ValueError where nothing is needed, or lengths do not fit together.
    """
    ranked = needed.numel() - window
    if ranking.shape != (ranked,) or ranked < 1:
        raise ValueError(f"ranking {tuple(ranking.shape)} of a prompt of {needed.numel()} with a window of {window}")
    if not needed.any():
        raise ValueError("no token is needed: leave such prompts out")
    order = torch.cat((torch.zeros(1, dtype=torch.int64, device=ranking.device), by_rank(ranking[1:]) + 1))
    places = needed[:ranked][order].nonzero()
    return window + (int(places.max()) + 1 if places.numel() else 0)
