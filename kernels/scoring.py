"""Importance of every prompt token as seen by the last W prompt queries (steps 1 to 4 of CLAA), in torch.

The same functions with plain loops are in naive.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# KV heads are scored in groups, so that the fp32 temporaries of a group stay near this size (bytes): a 128k
# prompt must not cost a gigabyte next to a KV pool that has taken the memory already.
_TEMPORARY_BYTES = 128 << 20
SHARED = 32  # queries of a window at a time, where their attention is averaged


def window_scores(q: Tensor, k: Tensor, *, scaling: float, pool_kernel: int) -> Tensor:
    """Attention mass that the window gives to each earlier token, per KV head, smoothed over positions.

    q: [W, heads, d] post-RoPE queries of the last W prompt tokens; k: [N, kv_heads, d] post-RoPE keys of all
    N prompt tokens, the window last. Any float dtype, same device; heads is a multiple of kv_heads; N > W.
    scaling: factor on the logits (usually d ** -0.5). pool_kernel: odd, in tokens.
    Returns fp32 [kv_heads, N-W]:
        p = softmax(scaling * q k^T) over all N keys, causal inside the window       [heads, W, N]
        s = sum over W of p, window columns dropped                                  [heads, N-W]
        average pool of s over positions, stride 1, zero padding counted; sum over the GQA group.
    Pooling is linear, so the group is summed first and pooled once.

    All arithmetic is fp32 (in fp16 small probabilities tie). Largest temporary: [heads, W, N] fp32, made per
    group of KV heads; no [heads, N, N]. Does not wait for the GPU. Raises ValueError for shapes that do not
    fit.
    """
    if pool_kernel < 1 or pool_kernel % 2 == 0:
        raise ValueError(f"window_scores: pool_kernel {pool_kernel} must be odd")
    mass = _folded("window_scores", q, k, scaling, lambda weights: weights.sum(dim=1))
    return F.avg_pool1d(mass, pool_kernel, stride=1, padding=pool_kernel // 2, count_include_pad=True)


def window_peaks(q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
    """Largest attention weight that any query of the window gives to each earlier token, per KV head.

    Arguments, memory and errors as of `window_scores`. Returns fp32 [kv_heads, N-W]: with the same p [heads, W, N],
    the maximum over W and the GQA group, window columns dropped. Not pooled.
    """
    return _folded("window_peaks", q, k, scaling, lambda weights: weights.amax(dim=1))


def window_shares(q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
    """Share of the window's attention that each earlier token gets: the mean weight over the window and the heads.

    Arguments and errors as of `window_scores`. Returns fp32 [N-W]; its sum is what the window does not give to itself.
    The window is taken in parts of SHARED queries, so that temporaries do not grow with it.
    """
    window, heads, _ = q.shape
    before = k.shape[0] - window
    total = torch.zeros(max(0, before), device=q.device)
    for first in range(0, window, SHARED):
        part = q[first : first + SHARED]
        # A causal query sees no key after its own, so the keys end with the part.
        scores = window_scores(part, k[: before + first + part.shape[0]], scaling=scaling, pool_kernel=1)
        total += scores[:, :before].sum(dim=0)
    return total / (window * heads)


def _folded(name: str, q: Tensor, k: Tensor, scaling: float, fold: Callable[[Tensor], Tensor]) -> Tensor:
    """fp32 [kv_heads, N-W]: `fold` of the weights [kv_heads, group * W, N] over their rows."""
    window, heads, dim = q.shape
    tokens, kv_heads, k_dim = k.shape
    if tokens <= window or heads % kv_heads or dim != k_dim:
        raise ValueError(
            f"{name}: q {tuple(q.shape)}, k {tuple(k.shape)}; needs more keys than queries, heads a multiple of "
            "kv_heads, equal head size"
        )
    group_rows = heads // kv_heads * window
    # Query head h reads KV head h // group: [W, kv, group, d] -> [kv, group * W, d], rows ordered (group, W).
    queries = q.float().view(window, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(kv_heads, group_rows, dim)
    queries = queries * scaling
    future = torch.ones(window, window, dtype=torch.bool, device=q.device).triu(1)
    future = future.repeat(heads // kv_heads, 1)

    per_head_bytes = 4 * tokens * (dim + 2 * group_rows)
    step = max(1, _TEMPORARY_BYTES // per_head_bytes)
    parts = []
    for first in range(0, kv_heads, step):
        part = slice(first, first + step)
        logits = torch.bmm(queries[part], k[:, part].float().permute(1, 2, 0))
        logits[..., tokens - window :].masked_fill_(future, -torch.inf)
        parts.append(fold(torch.softmax(logits, dim=-1))[:, : tokens - window])
    return torch.cat(parts)
