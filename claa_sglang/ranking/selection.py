"""From per-layer scores to one ranking, and from a ranking to kept positions (steps 5 and 6 of CLAA).

Device-agnostic, and no call here waits for the GPU. The reference with plain loops is kernels/naive.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Added to the standard deviation, as the authors' code does. It is 0 in fp16: scores must be fp32.
STD_EPSILON = 1e-8


def rank(scores: Sequence[Tensor]) -> Tensor:
    """Fold the step-4 scores of the scored layers into one ranking: z-score per row, then max over all rows.

    scores: one fp32 tensor [kv_heads, N-W] per scored layer (the number of heads may differ between layers).
    Returns fp32 [N-W], higher is more important:
    `max over layers and heads of (s - mean(s)) / (std(s) + 1e-8)`, mean and unbiased std over positions.

    Two cases the formula leaves open:
    one position only (N = W + 1): the unbiased std of one element is undefined; z is 0;
    a row with a non-finite score cannot be normalised: the whole row counts as -inf, so the other rows decide
    (and where there is none, `select` falls back on position order). Never NaN.
    """
    if not scores:
        raise ValueError("rank: needs the scores of at least one layer, got none")
    for layer_scores in scores:
        if layer_scores.ndim != 2 or layer_scores.dtype != torch.float32:
            shape, dtype = tuple(layer_scores.shape), layer_scores.dtype
            raise ValueError(f"rank: expected fp32 scores [kv_heads, N-W], got {dtype} {shape}")
    return torch.stack([_z_score(layer_scores).amax(dim=0) for layer_scores in scores]).amax(dim=0)


def _z_score(rows: Tensor) -> Tensor:
    if rows.shape[-1] == 1:
        return torch.zeros_like(rows).masked_fill(~rows.isfinite(), -torch.inf)
    std, mean = torch.std_mean(rows, dim=-1, correction=1, keepdim=True)
    z = (rows - mean) / (std + STD_EPSILON)
    return z.masked_fill(z.isnan(), -torch.inf)


def by_rank(ranking: Tensor) -> Tensor:
    """int64 [M]: positions of a ranking, fp32 [M], best first; of equal values the lower one, and NaN is -inf."""
    return torch.sort(ranking.masked_fill(ranking.isnan(), -torch.inf), descending=True, stable=True).indices


def select(ranking: Tensor, prompt_tokens: int, kept: int, window: int) -> Tensor:
    """Positions of the tokens to keep: the last `window`, the first one, and the best of the others.

    The first token is kept whatever its rank: models park attention on it (StreamingLLM, arXiv 2309.17453), and late
    layers without it are another model. It is one of the `kept`, unless these are the window alone.

    ranking: fp32 [N-W], N = prompt_tokens; ignored (may be empty) where N <= window, and then all N are kept.
    kept: from `plan.kept_count`, so min(window, N) <= kept <= N.
    Returns int64 [kept] on the ranking's device, ascending. Deterministic: of equal values the lower position
    wins, and NaN counts as -inf. Raises ValueError where lengths do not fit together.
    """
    if not min(window, prompt_tokens) <= kept <= prompt_tokens:
        raise ValueError(f"select: kept {kept} outside {min(window, prompt_tokens)}..{prompt_tokens}")
    if kept == prompt_tokens:
        return torch.arange(prompt_tokens, device=ranking.device)
    ranked = prompt_tokens - window
    if ranking.shape != (ranked,):
        raise ValueError(f"select: expected a ranking [{ranked}], got {tuple(ranking.shape)}")
    others = by_rank(ranking[1:])[: max(0, kept - window - 1)] + 1
    best = torch.cat((torch.arange(min(1, kept - window), device=ranking.device), others))
    tail = torch.arange(ranked, prompt_tokens, device=ranking.device)
    return torch.cat((best.sort().values, tail))
