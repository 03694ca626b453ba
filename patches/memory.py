"""Request table and slots: build the table with the late rows, and own the late slots beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len
from sglang.srt.mem_cache.common import evict_from_tree_cache

from claa_sglang.finishing.finishing import Finishing
from claa_sglang.finishing.queue import FinishQueue
from claa_sglang.memory.late_slots import LateSlots
from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook
from claa_sglang.start.server_config import config_of

GIB = 1 << 30
logger = logging.getLogger(__name__)


def late_slots_of(pool: Any) -> LateSlots:
    """The late slots attached to SGLang's request table. Raises RuntimeError where the hooks below did not run."""
    slots = pool._aux_cache
    if not isinstance(slots, LateSlots):
        raise RuntimeError(f"CLAA found {type(slots).__name__} beside the request table instead of its late slots")
    return slots


def build_table(original: Callable[..., Any], self: Any, *, max_num_reqs: int) -> Any:
    """AROUND `_build_req_to_token_pool`: one tensor, stock's rows first, then one block of late rows per prune step,
    and one of the rows that decoding reads in early layers, where those are restricted.

    Stock builds it at its full size, and then sees its own rows of it alone: they are a view of the same memory, so no
    copy of a dense row can go stale, and no second table is ever there.
    """
    rows = max_num_reqs + 1  # row 0 is padding
    pool = original(self, max_num_reqs=rows * (1 + _row_kinds(self)) - 1)
    table = attached.table.hang(pool, pool.req_to_token)
    pool.size, pool._alloc_size = max_num_reqs, rows
    pool.req_to_token = table[:rows]
    pool.free_slots = list(range(1, rows))
    pool.req_generation = pool.req_generation[:rows].clone()
    return pool


def late_rows_bytes(configurator: Any, kv_bytes: int) -> int:
    """What the late rows of the request table take beside a KV pool of `kv_bytes` or less."""
    tokens = configurator.config_from_budget(kv_bytes).max_total_num_tokens
    rows = configurator.resolve_max_num_reqs(tokens) + 1
    columns = configurator.model_config.context_len + get_req_to_token_extra_context_len()
    return rows * _row_kinds(configurator) * columns * torch.int32.itemsize


def leave_room_for_late_rows(result: int, self: Any, pre_model_load_memory: Any) -> int:
    """AFTER `_profile_available_bytes`: the KV pool gets what the late rows leave of `--mem-fraction-static`.

    Raises ValueError, as SGLang does, if they leave nothing.
    """
    late = late_rows_bytes(self, result)
    if late >= result:
        raise ValueError(
            f"claa-sglang: the late rows of the request table need {late / GIB:.2f} GiB of the {result / GIB:.2f} GiB "
            "that --mem-fraction-static leaves for the KV cache. Lower --max-running-requests or --context-length, "
            "prune in fewer steps, or raise --mem-fraction-static"
        )
    logger.info("CLAA: late rows of the request table take %d bytes that --mem-fraction-static counts", late)
    return result - late


def _row_kinds(configurator: Any) -> int:
    return config_of(configurator.server_args).row_kinds


def attach_slots(result: Any, self: Any, **kwargs: Any) -> Any:
    """AFTER `_init_pools`: late slots become the auxiliary cache of the request table."""
    pool = result.req_to_token_pool
    table, stride = attached.table.of(pool), pool.req_to_token.shape[0]
    config = config_of(self.server_args)
    slots = LateSlots(table, stride, result.token_to_kv_pool_allocator, evict=_no_tree, steps=len(config.steps))
    pool.attach_aux_cache(slots)
    if config.finish == "idle":
        # No more can wait than is cached.
        attached.finishing.hang(pool, Finishing(FinishQueue(capacity=slots.total)))
    return result


def _no_tree(_slots: int) -> None:
    """Before the prefix cache exists there is nothing to evict."""


def connect_tree(result: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER `build_kv_cache`: late slots may evict unlocked prefixes, as stock's own allocations do.

    The prefix cache learns the window, which a hit must leave to be computed.
    """
    tree = result.tree_cache
    attached.window.hang(tree, config_of(kwargs["server_args"]).window)
    late_slots_of(result.req_to_token_pool).evict = lambda count: evict_from_tree_cache(tree, count)
    return result


def bind_rows(result: Any, self: Any, reqs: list) -> Any:
    """AFTER `ReqToTokenPool.alloc`: late slots learn which pruned request took which row."""
    if result is not None:
        for req in reqs:
            state = attached.state.find(req)
            if state is None:
                continue
            state.decision.is_open = False
            if state.pruned:
                late_slots_of(self).bind(req.kv.req_pool_idx, state, generated=len(req.output_ids))
    return result


_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
HOOKS = (
    Hook(
        f"{_CONFIGURATOR}._build_req_to_token_pool",
        ("self", "max_num_reqs"),
        "around",
        build_table,
        "scheduler",
        "Late rows live in the same tensor as stock's request rows.",
    ),
    Hook(
        f"{_CONFIGURATOR}._profile_available_bytes",
        ("self", "pre_model_load_memory"),
        "after",
        leave_room_for_late_rows,
        "scheduler",
        "Late rows take memory that --mem-fraction-static must know of.",
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
