"""Request table and slots: widen the table by the late rows, and own the late slots beside it."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.common import evict_from_tree_cache

from claa_sglang.arguments import config_of
from claa_sglang.memory.late_slots import LateSlots
from claa_sglang.patches.hooks import Hook


def late_slots_of(pool: Any) -> LateSlots:
    """The late slots attached to SGLang's request table. Raises RuntimeError where the hooks below did not run."""
    slots = pool._aux_cache
    if not isinstance(slots, LateSlots):
        raise RuntimeError(f"CLAA found {type(slots).__name__} beside the request table instead of its late slots")
    return slots


def widen_table(result: Any, self: Any, *, max_num_reqs: int) -> Any:
    """AFTER `_build_req_to_token_pool`: one tensor, stock's rows first, then one block of late rows per prune step.

    Stock's rows stay a view of the same memory, so no copy of a dense row can go stale.
    """
    stock = result.req_to_token
    steps = len(config_of(self.server_args).steps)
    table = torch.zeros((stock.shape[0] * (steps + 1), stock.shape[1]), dtype=stock.dtype, device=stock.device)
    result.claa_table = table
    result.req_to_token = table[: stock.shape[0]]
    return result


def attach_slots(result: Any, self: Any, **kwargs: Any) -> Any:
    """AFTER `_init_pools`: late slots become the auxiliary cache of the request table."""
    pool = result.req_to_token_pool
    slots = LateSlots(pool.claa_table, pool.req_to_token.shape[0], result.token_to_kv_pool_allocator, evict=_no_tree)
    pool.attach_aux_cache(slots)
    return result


def _no_tree(_slots: int) -> None:
    """Before the prefix cache exists there is nothing to evict."""


def connect_tree(result: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER `build_kv_cache`: late slots may evict unlocked prefixes, as stock's own allocations do.

    The prefix cache learns the window, which a hit must leave to be computed.
    """
    tree = result.tree_cache
    tree.claa_window = config_of(kwargs["server_args"]).window
    late_slots_of(result.req_to_token_pool).evict = lambda count: evict_from_tree_cache(tree, count)
    return result


def bind_rows(result: Any, self: Any, reqs: list) -> Any:
    """AFTER `ReqToTokenPool.alloc`: late slots learn which pruned request took which row."""
    if result is not None:
        for req in reqs:
            state = getattr(req, "claa", None)
            if state is not None and state.pruned:
                state.is_open = False
                late_slots_of(self).bind(req.kv.req_pool_idx, state, generated=len(req.output_ids))
    return result


_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
HOOKS = (
    Hook(
        f"{_CONFIGURATOR}._build_req_to_token_pool",
        ("self", "max_num_reqs"),
        "after",
        widen_table,
        "scheduler",
        "Late rows live in the same tensor as stock's request rows.",
    ),
    Hook(
        f"{_CONFIGURATOR}._init_pools",
        ("self", "sizes", "req_to_token_pool", "token_to_kv_pool_allocator"),
        "after",
        attach_slots,
        "scheduler",
        "Late slots are an auxiliary cache of the request table, freed with its rows.",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_builder.build_kv_cache",
        (
            "server_args",
            "model_config",
            "tp_worker",
            "page_size",
            "spec_algorithm",
            "enable_metrics",
            "enable_kv_cache_events",
            "enable_hierarchical_cache",
            "hicache_draft_plan",
            "dynamo_kv_event_format",
            "kv_event_lora_names",
            "draft_swa_window",
        ),
        "after",
        connect_tree,
        "scheduler",
        "Taking late slots may evict unlocked prefixes.",
    ),
    Hook(
        "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.alloc",
        ("self", "reqs"),
        "after",
        bind_rows,
        "scheduler",
        "Late slots must know which request owns a row before its KV is allocated.",
    ),
)
