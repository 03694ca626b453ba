"""Late slots wired as in the server, on SGLang's own allocator and request table."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from claa_sglang.config.config import PruneStep
from claa_sglang.memory.census import Owned, SlotCensus
from claa_sglang.memory.late_slots import LateSlots
from claa_sglang.patches.checks import free_slots
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import Progress, RequestPlan, RequestState

ROWS, WIDTH, WINDOW, RATES = 4, 48, 2, (0.5, 0.2)


def make_state(prompt: int, counts: tuple[int, ...]) -> RequestState:
    steps = tuple(PruneStep(prune_layer=i, keep_rate=RATES[i], score_layers=(i,)) for i in range(len(counts)))
    return RequestState(RequestPlan(RequestOptions(), prompt, steps, counts), Progress.before_any(len(counts)))


def make_pool(steps: int, size: int, need_sort: bool = False, page: int = 1):
    """(request table, allocator, late slots) wired as in the server: the late slots are the table's auxiliary cache."""
    if page == 1:
        allocator = TokenToKVPoolAllocator(size, torch.int64, "cpu", None, need_sort)
    else:
        allocator = PagedTokenToKVPoolAllocator(size, page, torch.int64, "cpu", None, need_sort)
    pool = ReqToTokenPool(ROWS, WIDTH, "cpu", False)
    stride = pool.req_to_token.shape[0]
    # Nonsense in unwritten entries, so that reading one shows.
    table = torch.full(((steps + 1) * stride, WIDTH), -1, dtype=torch.int32)
    pool.req_to_token = table[:stride]
    slots = LateSlots(table, stride, allocator, evict=lambda _: None)
    pool.attach_aux_cache(slots)
    return pool, allocator, slots


def extend(slots: LateSlots, lengths: dict[int, int]) -> None:
    slots.alloc_to_lengths(
        req_pool_indices_cpu=torch.tensor(list(lengths), dtype=torch.int64),
        target_seq_lens_cpu=torch.tensor(list(lengths.values()), dtype=torch.int64),
    )


def listed(slots: LateSlots, row: int, level: int, count: int) -> list[int]:
    return slots.table[level * slots.stride + row, :count].tolist()


def owned_twice(allocator: BaseTokenToKVPoolAllocator, slots: LateSlots) -> list[str]:
    late = [Owned(f"row {row}", held) for row, held in slots.holdings()]
    census = SlotCensus(allocator.size + allocator.page_size - 1, "cpu")
    return census.shared([Owned("free", free_slots(allocator)), *late])
