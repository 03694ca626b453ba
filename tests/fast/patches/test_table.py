"""The request table: one allocation for stock's rows and the late ones, and counted before the KV pool is sized."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from torch.utils._python_dispatch import TorchDispatchMode

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.config.profile_choice import Choice
from claa_sglang.patches import attached, memory

REQUESTS, COLUMNS = 7, 1000
STEPS = (
    PruneStep(prune_layer=3, keep_rate=0.5, score_layers=(3,)),
    PruneStep(prune_layer=5, keep_rate=0.2, score_layers=(5,)),
)


class Allocated(TorchDispatchMode):
    """Keeps the storages of int32 tensors that are made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.int32:
            self.storages[out.untyped_storage().data_ptr()] = out.untyped_storage()
        return out


def configurator(steps: int, **more: Any) -> Any:
    config = ClaaConfig(steps=STEPS[:steps], num_layers=8)
    return SimpleNamespace(server_args=SimpleNamespace(_claa_choice=Choice(config, None, ())), **more)


def stock_build(_self: Any, *, max_num_reqs: int) -> ReqToTokenPool:
    return ReqToTokenPool(max_num_reqs, COLUMNS, "cpu", False)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_table_is_allocated_once_and_stock_sees_its_own_rows(steps: int) -> None:
    with Allocated() as allocated:
        pool = memory.build_table(stock_build, configurator(steps), max_num_reqs=REQUESTS)
    rows = REQUESTS + 1
    table = attached.table.of(pool)
    assert table.shape == (rows * (steps + 1), COLUMNS)
    assert [storage.nbytes() for storage in allocated.storages.values()] == [table.nbytes]
    stock = stock_build(None, max_num_reqs=REQUESTS)
    assert pool.req_to_token.data_ptr() == table.data_ptr()
    for name in ("size", "_alloc_size", "max_context_len", "free_slots"):
        assert getattr(pool, name) == getattr(stock, name), name
    for name in ("req_to_token", "req_generation"):
        assert torch.equal(getattr(pool, name), getattr(stock, name)), name
    assert pool.alloc_rows(REQUESTS) == stock.alloc_rows(REQUESTS) and pool.alloc_rows(1) is None


@pytest.mark.parametrize("steps", [1, 2])
def test_late_rows_are_taken_from_the_budget_of_the_kv_pool(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a published server; what a real one takes is in its log (tests/engine/test_recorders.py).
    monkeypatch.setattr(memory, "get_req_to_token_extra_context_len", lambda: 4)
    asked = configurator(
        steps,
        config_from_budget=lambda budget: SimpleNamespace(max_total_num_tokens=budget // 1000),
        resolve_max_num_reqs=lambda tokens: min(2048, tokens // 2),
        model_config=SimpleNamespace(context_len=131072),
    )
    table = steps * 2049 * 131076 * 4
    assert table / steps / memory.GIB == pytest.approx(1, abs=0.001)
    assert memory.leave_room_for_late_rows(60 * memory.GIB, asked, None) == 60 * memory.GIB - table
    with pytest.raises(ValueError, match="late rows of the request table need .*--max-running-requests"):
        memory.leave_room_for_late_rows(table, asked, None)
