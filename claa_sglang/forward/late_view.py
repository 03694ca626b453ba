"""The late view: a forward batch rewritten so that late layers see another, shorter request.

Works on a copy of SGLang's ForwardBatch and imports nothing of SGLang: it sets the fields that attention backends and
layers read. Everything set here is known before layer 0, except `positions` (and, after a second prune step,
`out_cache_loc`), which need the ranking.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from claa_sglang.forward.batch_plan import Segment


def make_view(batch: Any, segments: Sequence[Segment], table: Tensor, *, decode: bool) -> Any:
    """A copy of `batch` in which each request has the rows and lengths of `segments`.

    Args:
        batch: SGLang's ForwardBatch of the early layers.
        segments: one level of the batch plan, at least one segment.
        table: the widened request table, int32 `[rows, max_context_len]`.
        decode: whether every segment is one generated token.

    The view writes its KV to the slots its own table rows list for these tokens. The caller binds the view's slot plan.
    """
    device = batch.seq_lens.device
    view = copy.copy(batch)
    view.batch_size = len(segments)
    seq_lens = [s.seq_len for s in segments]
    rows = [s.row for s in segments]
    lens_d, rows_d = on_device([seq_lens, rows], torch.int64, device)
    view.req_pool_indices = rows_d.to(batch.req_pool_indices.dtype)
    view.seq_lens = lens_d.to(batch.seq_lens.dtype)
    view.orig_seq_lens = lens_d.to(torch.int32)
    view.seq_lens_cpu = torch.tensor(seq_lens, dtype=torch.int64)
    view.seq_lens_sum = sum(seq_lens)
    view.max_seq_len_host = max(seq_lens)
    view.residual_stream = None
    if decode:
        view.out_cache_loc = table[rows_d, lens_d - 1].to(torch.int64)
        return view

    extend = [s.rows for s in segments]
    prefix = [s.prefix_len for s in segments]
    starts = [s.start for s in segments]
    extend_d, prefix_d, starts_d = on_device([extend, prefix, starts], torch.int32, device)
    view.req_pool_indices_cpu = torch.tensor(rows, dtype=torch.int64)
    view.extend_seq_lens, view.extend_prefix_lens, view.extend_start_loc = extend_d, prefix_d, starts_d
    view.extend_seq_lens_cpu, view.extend_prefix_lens_cpu = extend, prefix
    view.extend_num_tokens = sum(extend)
    view.global_num_token_non_padded_cpu = view.extend_num_tokens  # else rows past the chunk's count are cut off
    view.input_ids = torch.zeros(view.extend_num_tokens, dtype=batch.input_ids.dtype, device=device)
    view.return_logprob = False  # the logits processor reads the early batch
    view.out_cache_loc = write_slots(segments, table)
    return view


def write_slots(segments: Sequence[Segment], table: Tensor) -> Tensor:
    """Slots in which the segments' rows keep their KV: int64 `[rows]`."""
    return torch.cat([table[s.row, s.prefix_len : s.seq_len] for s in segments]).to(torch.int64)


def on_device(values: list[list[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers as one tensor `[len(values), n]` on `device`, without waiting for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
