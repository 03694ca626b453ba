"""Log-sum-exp of the last prompt queries over paged keys, by FlashInfer's paged attention.

What the first two launches of window_attention.py compute, for its third: `window_mass(..., lse=...)`. FlashInfer is
imported when something here is called, never before.

It is the same attention as the prefill's own, of few rows: the windows' queries over all keys of their requests, causal
at the end. Pages are single slots, so a request's pages are its row of the request table. The keys stand in for the
values too: the output is thrown away, and what has just been read as a key is in the L2 cache.

FlashInfer cuts prompts into parts that depend on the whole batch. So the last bits of a request's log-sum-exp depend on
its neighbours, which the Triton kernels' do not.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKEND = "fa2"  # it cuts long prompts into parts, and SGLang's paged prefill compiles the same kernels
HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)
# Partial results of one run, at most: two programs on each multiprocessor, each with 128 rows of 128 numbers, or 64 of
# 256, and a log-sum-exp of each row. Doubled, as the bound is FlashInfer's own and may move.
_PROGRAMS, _NUMBERS = 2, 128 * 128 + 128
_ROOM = 2


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashInfer has kernels for queries and keys of this type and head size."""
    return dtype in _DTYPES and head_dim in HEAD_DIMS


def is_ready(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a plan could be run at once: FlashInfer is imported in this process already, and has its kernel compiled.

    Importing it takes seconds, compiling a kernel minutes. Never raises: what cannot be asked is not ready.
    """
    if not takes(dtype, head_dim) or "flashinfer" not in sys.modules:
        return False
    try:
        from flashinfer.prefill import _gen_batch_prefill_primary_module

        # Types of q, kv, output and indices; head sizes; no positions, no sliding window, no soft cap, fp32 products.
        spec = _gen_batch_prefill_primary_module(
            BACKEND, dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False
        )
        return bool(spec.is_compiled)
    except Exception:  # noqa: BLE001
        return False


class PagedLse:
    """FlashInfer's plan for the windows of one batch; called once for each layer of one forward.

    Made from host numbers alone. Neither making it nor calling it waits for the GPU, but the first plans of a process,
    which allocate: about 35 MiB on a GPU of 132 multiprocessors for all, and 8 MiB there and 8 MiB pinned for each plan
    that is under way at once.

    Args:
        table: int32 `[table rows, columns]` on the GPU, last stride 1: the slots of a request's tokens, in any order.
        first_rows: per request, the index among the queries of its first window row.
        table_rows: per request, its row of the table.
        tokens: N per request, larger than the window.
        window: W, in tokens.
        queries: Q, 1 to W: the last so many of the window.
        heads, kv_heads, head_dim: of the model on this rank; heads is a multiple of kv_heads.
        dtype: of queries and keys, bf16 or fp16.

    Raises:
        ValueError: a type or head size that FlashInfer has not (`takes`).
        ImportError: FlashInfer is not installed.
        Whatever FlashInfer raises where its kernel does not compile.
    """

    def __init__(
        self,
        table: Tensor,
        first_rows: Sequence[int],
        table_rows: Sequence[int],
        tokens: Sequence[int],
        *,
        window: int,
        queries: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        if not takes(dtype, head_dim):
            raise ValueError(f"PagedLse: {dtype}, head size {head_dim}; needs bf16 or fp16 and one of {HEAD_DIMS}")
        self._queries, self._heads, self._kv_heads = queries, heads, kv_heads
        device, count = table.device, len(tokens)
        host = host_plan(tokens, queries)
        slots = [table[row, :length] for row, length in zip(table_rows, tokens, strict=True)]
        self._rows = window_rows(first_rows, window, queries, device)
        held = _take(device)
        # Given back with this object; by then everything that reads its device buffers is in the stream.
        weakref.finalize(self, _give_back, device, held).atexit = False
        self._wrapper = held.wrapper
        self._wrapper.plan(
            _pinned(host.query_starts, device),
            _pinned(host.key_starts, device),
            slots[0] if count == 1 else torch.cat(slots),
            _pinned([1] * count, device),  # of pages of one slot, the last one is full
            heads,
            kv_heads,
            head_dim,
            1,
            causal=True,
            sm_scale=1.0,  # a layer's own comes with its queries
            q_data_type=dtype,
            kv_data_type=dtype,
            seq_lens=_pinned(tokens, device),
        )
        held.mark()
        rows = count * queries
        self._out = torch.empty(rows, heads, head_dim, dtype=dtype, device=device)
        self._lse = torch.empty(rows, heads, dtype=torch.float32, device=device)

    def __call__(self, q: Tensor, key_buffer: Tensor, scaling: float) -> Tensor:
        """The log-sum-exp of one layer.

        Args:
            q: post-RoPE queries `[rows, heads, head_dim]`, all rows of the batch; last stride 1.
            key_buffer: post-RoPE keys `[slots, kv_heads, head_dim]`, this forward's included; last stride 1.
            scaling: factor on the logits.

        Returns:
            fp32 `[R, kv_heads, Q * group]` to the base 2, as `window_mass` takes it.
        """
        pages = key_buffer.unsqueeze(1)
        _, lse = self._wrapper.run(
            q[self._rows], (pages, pages), q_scale=scaling, out=self._out, lse=self._lse, return_lse=True
        )
        return by_kv_head(lse, self._queries, self._kv_heads)


class HostPlan(NamedTuple):
    """Where the query rows and the keys of each request start, and where the last one's end."""

    query_starts: list[int]
    key_starts: list[int]


def host_plan(tokens: Sequence[int], queries: int) -> HostPlan:
    """What FlashInfer is told of a batch: its last `queries` rows, and all keys, of each request."""
    starts = [0]
    for length in tokens:
        starts.append(starts[-1] + length)
    return HostPlan([queries * i for i in range(len(tokens) + 1)], starts)


def window_rows(first_rows: Sequence[int], window: int, queries: int, device: torch.device) -> slice | Tensor:
    """Which rows among the queries are the last `queries` of each window, in order: to index with.

    A slice for one request, which costs no copy; int64 `[R * queries]` on `device` for more.
    """
    starts = [first + window - queries for first in first_rows]
    if len(starts) == 1:
        return slice(starts[0], starts[0] + queries)
    rows = [start + row for start in starts for row in range(queries)]
    return _pinned(rows, device, torch.int64).to(device, non_blocking=True)


def by_kv_head(lse: Tensor, queries: int, kv_heads: int) -> Tensor:
    """fp32 `[R, kv_heads, queries * group]`, contiguous, of FlashInfer's `[R * queries, kv_heads * group]`."""
    rows, heads = lse.shape
    group = heads // kv_heads
    by_query = lse.view(rows // queries, queries, kv_heads, group)
    return by_query.transpose(1, 2).contiguous().view(-1, kv_heads, queries * group)


def _pinned(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Host numbers from which a copy to `device` does not wait."""
    return torch.tensor(list(values), dtype=dtype, pin_memory=device.type == "cuda")


# --- wrappers ----------------------------------------------------------------------------------------------------


class _Held:
    """A wrapper of FlashInfer's, which has 8 MiB on the GPU and as much pinned, and the end of its last plan's copy."""

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        self.wrapper, self._device = wrapper, device
        self._planned = torch.cuda.Event()

    def mark(self) -> None:
        """Call it when a plan is in the stream."""
        self._planned.record(torch.cuda.current_stream(self._device))

    @property
    def can_be_planned(self) -> bool:
        return self._planned.query()


_lock = threading.Lock()
_free: dict[torch.device, list[_Held]] = {}
_workspaces: dict[torch.device, Tensor] = {}


def _take(device: torch.device) -> _Held:
    """A wrapper that can be planned now.

    A plan is written to pinned memory and copied from there in the stream. While the GPU has not come that far,
    planning again would overwrite what it is about to copy, so such a wrapper is passed over. There are as many as
    forwards and looks are under way.
    """
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    with _lock:
        free = _free.setdefault(device, [])
        for index, held in enumerate(free):
            if held.can_be_planned:
                return free.pop(index)
        if device not in _workspaces:
            # One for all: what a run leaves in it is read by that run alone, and runs follow each other in a stream.
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            _workspaces[device] = torch.empty(_workspace_bytes(processors), dtype=torch.uint8, device=device)
        return _Held(BatchPrefillWithPagedKVCacheWrapper(_workspaces[device], "NHD", backend=BACKEND), device)


def _give_back(device: torch.device, held: _Held) -> None:
    # Without the lock: a garbage collection may run this in a thread that holds it, and appending is one step.
    _free.setdefault(device, []).append(held)


def _workspace_bytes(processors: int) -> int:
    return _ROOM * 4 * _PROGRAMS * processors * _NUMBERS


def release() -> None:
    """Free the memory of all wrappers that no plan holds."""
    with _lock:
        _free.clear()
        _workspaces.clear()
