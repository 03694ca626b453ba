"""CLAA's own invariants, beside SGLang's and under SGLang's switches.

At idle, always: every late slot is back. While busy, when SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY counts the pool in
every step, late slots are counted too; with SGLANG_CHECK_KV_PAGE_INVARIANTS=1 beside it every step also takes a census
(`claa_sglang/memory/census.py`): no slot has two owners, and no request reads what another kind of request wrote. So
no node of the pruned namespace is visible to a dense request, nor the reverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.environ import envs

from claa_sglang.memory.census import DENSE, LATE, PRUNED, Owned, Read, SlotCensus
from claa_sglang.patches import attached
from claa_sglang.patches.forward_batch import INIT_NEW, batch_and_runner
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.memory import late_slots_of
from claa_sglang.patches.requests import pruned_state


def count_late_slots(result: tuple[int, int], self: Any) -> tuple[int, int]:
    """AFTER `_get_total_uncached_sizes`: late slots are held by requests, not leaked."""
    full, swa = result
    return full + late_slots_of(self.req_to_token_pool).held, swa


def check_idle(result: Any, self: Any) -> Any:
    """AFTER `_check_req_pool`, which runs when nothing does: every late slot is back."""
    held = late_slots_of(self.req_to_token_pool).held
    if held:
        self._report_leak("CLAA late slots", f"{held} late slots are held while the server is idle")
    return result


def record_writes(result: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER `ForwardBatch.init_new`, with the census on: what kind of request writes which slots."""
    if not envs.SGLANG_CHECK_KV_PAGE_INVARIANTS.get():
        return result
    batch, runner = batch_and_runner(args, kwargs)
    census = _census(runner.req_to_token_pool)
    rows = [1] * len(batch.reqs) if result.forward_mode.is_decode() else batch.extend_lens
    for req, slots in zip(batch.reqs, result.out_cache_loc.to(torch.int64).split(rows), strict=True):
        census.wrote(slots, _kind(req))
    return result


def take_census(result: Any, self: Any) -> Any:
    """AFTER `_check_kv_page_invariants`: raises AssertionError, which stops the server, as SGLang's busy checks do."""
    pool = self.req_to_token_pool
    census = _census(pool)
    late = [Owned(f"late slots of row {row}", slots) for row, slots in late_slots_of(pool).holdings()]
    for _, slots in late:
        census.wrote(slots, LATE)
    tree = self.tree_cache.all_values_flatten() if self.tree_cache.supports_prefix_sharing() else None
    owned = [
        Owned("the free list", free_slots(self.token_to_kv_pool_allocator)),
        *([] if tree is None else [Owned("the prefix cache", tree.to(census.device))]),
        *late,
        *(Owned(f"request {req.rid}", row[req.kv.cache_protected_len :]) for req, row in _rows(self)),
    ]
    reads = [Read(f"request {req.rid}", row, _kind(req)) for req, row in _rows(self)]
    problems = census.shared(owned) + census.strangers(reads)
    assert not problems, "CLAA census: " + "; ".join(problems)
    return result


def free_slots(allocator: Any) -> torch.Tensor:
    """Every slot of the free list's pages: int64."""
    pages = allocator.get_all_free_pages()
    within = torch.arange(allocator.page_size, device=pages.device)
    return (pages[:, None] * allocator.page_size + within).flatten()


def note_dense(pool: Any, pruned: torch.Tensor, dense: torch.Tensor, start: int) -> None:
    """With the census on: a finishing step read `pruned` and the first `start` of `dense`, and wrote the rest of them.

    Slots, int64 `[n]` each. Raises AssertionError where it read what another kind of request wrote.
    """
    if not envs.SGLANG_CHECK_KV_PAGE_INVARIANTS.get():
        return
    census = _census(pool)
    reads = [Read("a finishing step", pruned, PRUNED), Read("a finishing step", dense[:start], DENSE)]
    problems = census.strangers(reads)
    assert not problems, "CLAA census: " + "; ".join(problems)
    census.wrote(dense[start:], DENSE)


def _kind(req: Any) -> int:
    return DENSE if pruned_state(req) is None else PRUNED


def _rows(checker: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """Every request that has a row, and the slots its row lists: int64, one per token that has KV."""
    table = checker.req_to_token_pool.req_to_token
    for req in checker._requests_owning_rows():
        yield req, table[req.kv.req_pool_idx, : req.kv.kv_allocated_len].to(torch.int64)


def _census(pool: Any) -> SlotCensus:
    census = attached.census.find(pool)
    if census is None:
        slots = late_slots_of(pool)
        # Page 0 is not handed out.
        last = slots.total + slots.pages.size - 1
        census = attached.census.hang(pool, SlotCensus(last, pool.req_to_token.device))
    return census


_CHECKER = "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"
HOOKS = (
    Hook(
        f"{_CHECKER}._get_total_uncached_sizes",
        ("self",),
        "after",
        count_late_slots,
        "scheduler",
        "SGLang's conservation check must see late slots.",
    ),
    Hook(
        f"{_CHECKER}._check_req_pool",
        ("self",),
        "after",
        check_idle,
        "scheduler",
        "Nothing may hold a late slot when the server is idle.",
    ),
    Hook(
        f"{_CHECKER}._check_kv_page_invariants",
        ("self",),
        "after",
        take_census,
        "scheduler",
        "Where SGLang looks at the owners of single slots, late slots and namespaces are looked at too.",
    ),
    Hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        INIT_NEW,
        "after",
        record_writes,
        "scheduler",
        "The census must know what kind of request wrote a slot.",
    ),
)
