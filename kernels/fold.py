"""Pooling, z-score and max fold of one scored layer into the ranking of every request (steps 3 to 5), in Triton.

The numbers of claa_sglang/ranking/selection.py (CLAA, arXiv 2602.16054), for every request of a batch at once and
without the pooled scores ever being in memory. naive.py does the same with plain loops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Positions of one program. Fixed: the order of a row's sums, and so its last bits, must depend on the row alone.
_BLOCK = 1024
# Blocks whose partial moments are read together.
_MOMENTS = 128


def fold(
    mass: Tensor,
    requests: Tensor,
    ranking: Tensor,
    *,
    window: int,
    pool_kernel: int,
    max_tokens: int,
    first_layer: bool,
) -> None:
    """Fold one layer's attention mass into the ranking, in place.

    For a request and KV head, over its N-W positions:
        s = average pool of the mass, stride 1, zero padding counted
        z = (s - mean(s)) / (std(s) + 1e-8), unbiased std
        ranking = max(ranking, z of every KV head)

    Args:
        mass: fp32 `[kv_heads * P]`, contiguous, P = the sum of N-W over the requests: the `[kv_heads, N-W]` of each
            request one after the other, as `window_mass` returns it.
        requests: int32 `[4, R]` as for `window_mass`; the last two rows are read.
        ranking: fp32 `[P]`, contiguous: the `[N-W]` of each request one after the other.
        window: W.
        pool_kernel: odd, in tokens.
        max_tokens: the largest N.
        first_layer: whether `ranking` holds nothing yet; its content is then ignored.

    One position only (N = W + 1): z is 0. A row (request and KV head) with a non-finite score, or with scores whose
    squares fp32 cannot sum (beyond about 1e18), counts as -inf entirely. Never NaN.

    Two launches: moments, grid (blocks of 1024 positions, kv_heads, R); fold, grid (blocks, R). Moments of a block are
    two-pass and blocks are merged by Chan's formula in fixed order: sound for any length, deterministic, and
    independent of the rest of the batch. fp32, no atomics. Never waits for the GPU. Allocates
    `workspace_bytes(R, kv_heads, max_tokens - window)`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    positions = ranking.numel()
    if mass.dtype != torch.float32 or ranking.dtype != torch.float32 or requests.dtype != torch.int32:
        raise ValueError(f"fold: mass is {mass.dtype}, ranking {ranking.dtype}, requests {requests.dtype}")
    if not (mass.is_contiguous() and ranking.is_contiguous() and requests.is_contiguous()):
        raise ValueError("fold: mass, ranking and requests must be contiguous")
    if (
        positions < 1
        or mass.numel() < positions
        or mass.numel() % positions
        or requests.ndim != 2
        or requests.shape[0] != 4
        or requests.shape[1] < 1
        or not window < max_tokens
        or pool_kernel < 1
        or pool_kernel % 2 == 0
    ):
        raise ValueError(
            f"fold: mass {tuple(mass.shape)}, ranking {tuple(ranking.shape)}, requests {tuple(requests.shape)}, window "
            f"{window}, longest prompt {max_tokens}, pool_kernel {pool_kernel}; needs whole rows, an odd pool_kernel"
        )
    kv_heads, count = mass.numel() // positions, requests.shape[1]
    blocks = triton.cdiv(max_tokens - window, _BLOCK)
    means = torch.empty(count * kv_heads * blocks, dtype=torch.float32, device=mass.device)
    squares = torch.empty_like(means)
    _moments_kernel[(blocks, kv_heads, count)](
        mass, requests, means, squares, window, pool_kernel, BLOCK=_BLOCK, num_warps=4
    )
    _fold_kernel[(blocks, count)](
        mass, requests, means, squares, ranking, kv_heads, window, pool_kernel,
        FIRST_LAYER=first_layer, BLOCK=_BLOCK, MOMENTS=_MOMENTS, num_warps=4,
    )  # fmt: skip


def workspace_bytes(requests: int, kv_heads: int, max_positions: int) -> int:
    """Bytes `fold` allocates; max_positions is the largest N-W."""
    return 8 * requests * kv_heads * triton.cdiv(max_positions, _BLOCK)


@triton.jit
def _pooled(row, at, ranked, pool_kernel):
    """Average over the `pool_kernel` positions around each of `at`; what is outside [0, ranked) counts as 0."""
    total = tl.zeros(at.shape, tl.float32)
    for step in range(0, pool_kernel):
        source = at + step - pool_kernel // 2
        total += tl.load(row + source, mask=(source >= 0) & (source < ranked), other=0.0)
    return total / pool_kernel


@triton.jit
def _moments_kernel(mass, requests, means, squares, window, pool_kernel, BLOCK: tl.constexpr):
    """Mean, and sum of squared distances from it, of one block: [R, kv_heads, blocks]."""
    block, kv_head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks, kv_heads, count = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    ranked = tl.load(requests + 2 * count + request) - window
    first = block * BLOCK
    if first >= ranked:
        return
    before = tl.load(requests + 3 * count + request).to(tl.int64) * kv_heads
    at = first + tl.arange(0, BLOCK)
    scores = _pooled(mass + before + kv_head.to(tl.int64) * ranked, at, ranked, pool_kernel)
    mean = tl.sum(tl.where(at < ranked, scores, 0.0), axis=0) / tl.minimum(ranked - first, BLOCK)
    away = tl.where(at < ranked, scores - mean, 0.0)
    place = (request * kv_heads + kv_head).to(tl.int64) * blocks + block
    tl.store(means + place, mean)
    tl.store(squares + place, tl.sum(away * away, axis=0))


@triton.jit
def _merged_moments(means, squares, ranked, BLOCK: tl.constexpr, MOMENTS: tl.constexpr):
    """Mean, and sum of squared distances from it, of a whole row of `ranked` positions, from those of its blocks."""
    blocks = tl.cdiv(ranked, BLOCK)
    mean = 0.0
    for start in range(0, blocks, MOMENTS):
        block = start + tl.arange(0, MOMENTS)
        size = tl.minimum(ranked - block * BLOCK, BLOCK).to(tl.float32)
        part = tl.load(means + block, mask=block < blocks, other=0.0)
        mean += tl.sum(part * tl.where(block < blocks, size / ranked, 0.0), axis=0)
    total = 0.0
    for start in range(0, blocks, MOMENTS):
        block = start + tl.arange(0, MOMENTS)
        size = tl.minimum(ranked - block * BLOCK, BLOCK).to(tl.float32)
        away = tl.load(means + block, mask=block < blocks, other=0.0) - mean
        inside = tl.load(squares + block, mask=block < blocks, other=0.0)
        total += tl.sum(tl.where(block < blocks, inside + size * away * away, 0.0), axis=0)
    return mean, total


@triton.jit
def _fold_kernel(
    mass,
    requests,
    means,
    squares,
    ranking,
    kv_heads,
    window,
    pool_kernel,
    FIRST_LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """z-scores of one block of positions for every KV head, and their maximum with the ranking so far."""
    block, request = tl.program_id(0), tl.program_id(1)
    blocks, count = tl.num_programs(0), tl.num_programs(1)
    ranked = tl.load(requests + 2 * count + request) - window
    first = block * BLOCK
    if first >= ranked:
        return
    before = tl.load(requests + 3 * count + request).to(tl.int64)
    at = first + tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for kv_head in range(0, kv_heads):
        row = (request * kv_heads + kv_head).to(tl.int64) * blocks
        mean, total = _merged_moments(means + row, squares + row, ranked, BLOCK, MOMENTS)
        std = tl.sqrt(total / tl.maximum(ranked - 1, 1))
        offset = before * kv_heads + ranked.to(tl.int64) * kv_head
        z = (_pooled(mass + offset, at, ranked, pool_kernel) - mean) / (std + 1e-8)
        # Of one position the difference is 0, but for a product that is fused on the way and rounds otherwise.
        z = tl.where(ranked == 1, 0.0, z)
        # Of a non-finite number both comparisons are false, or one.
        finite = (tl.abs(mean) < float("inf")) & (tl.abs(total) < float("inf"))
        best = tl.maximum(best, tl.where(finite, z, float("-inf")))
    if not FIRST_LAYER:
        best = tl.maximum(best, tl.load(ranking + before + at, mask=at < ranked, other=0.0))
    tl.store(ranking + before + at, best, mask=at < ranked)
