"""Compile the GPU kernels for this model before the first request: on it, a second or two would count as its TTFT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from claa_sglang.boundary import BoundaryStore
from claa_sglang.config import ClaaConfig
from claa_sglang.request import RequestOptions
from claa_sglang.scorers import KernelScorer, Scored
from claa_sglang.state import RequestState


def warm_up(
    key_buffer: Tensor, heads: int, table: Tensor, boundaries: Sequence[BoundaryStore], config: ClaaConfig
) -> None:
    """Run every kernel once on next to nothing; does nothing where there is no GPU.

    Args:
        key_buffer: keys of one layer, `[slots, kv_heads, head_dim]`.
        heads: query heads of this rank.
        table: the widened request table; its row 0 belongs to no request, and slot 0, which it lists, to nobody.
        boundaries: the boundary stores.

    Raises:
        RuntimeError: with what failed, if a kernel does not compile or run.
    """
    if not table.is_cuda:
        return
    state = RequestState.dense_request(RequestOptions(), 0, "warm-up")
    scorer = KernelScorer([Scored(0, state, 0, 0, config.window + 1)], table, config)
    queries = key_buffer.new_zeros(config.window, heads, key_buffer.shape[-1])
    for _ in range(2):  # the first layer's kernel and the others'
        scorer.score(queries, key_buffer, 1.0)
    slot = torch.zeros(1, dtype=torch.int64, device=table.device)
    for boundary in boundaries:
        boundary.store(slot, *boundary.load(slot))
    if state.error is not None:
        raise RuntimeError(state.error)
