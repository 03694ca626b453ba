"""Steps of finishing on SGLang's own prefix cache and allocator. Only the forward, which needs a model, is left out."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_parallel

from claa_sglang.finishing.finishing import QUIET, Finishing
from claa_sglang.finishing.queue import Prefix
from claa_sglang.patches import attached, finishing
from claa_sglang.patches.requests import pruned_key, sharers
from tests.fast.patches.world import CONFIG, PROMPT, World

STEP = 600  # tokens: two whole steps and a rest of `PROMPT`
KEY = (CONFIG.namespace, None)
PREFIX = Prefix(array("q", PROMPT), KEY)


class IdleScheduler(World):
    """What a step asks of SGLang's scheduler. `forwards` are the spans that were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.finishing = attached.finishing.hang(self.pool, Finishing(clock=lambda: self.now))
        self.req_to_token_pool, self.tree_cache, self.token_to_kv_pool_allocator = self.pool, self.tree, self.allocator
        self.server_args, self.chunked_prefill_size, self.forward_ct = None, 8192, 5
        self.metrics_collector: Any = None  # as without --enable-metrics
        self.idle, self.stock = True, 0
        self.forwards: list[tuple[int, int]] = []
        self.fails = False

    def is_fully_idle(self) -> bool:
        return self.idle

    def on_idle(self, times: int = 1) -> None:
        for _ in range(times):
            finishing.finish_some(IdleScheduler._stock, self)

    def _stock(self) -> None:
        self.stock += 1

    def compute(self, _scheduler: Any, _prefix: Prefix, pruned: Any, dense: Any, slots: torch.Tensor) -> None:
        """In place of the forward."""
        self.forward_ct += 1
        self.forwards.append((dense.tokens, dense.tokens + len(slots)))
        assert pruned.tokens >= dense.tokens + len(slots)
        if self.fails:
            raise RuntimeError("planted")

    def cached(self, pruned: bool, prefix: Prefix = PREFIX) -> int:
        return finishing._cached(self.tree, prefix, is_dense=not pruned).tokens

    def wait(self) -> None:
        """Something waits, and it is quiet from now on."""
        self.finishing.queue.add(PREFIX)
        self.on_idle()
        self.now += 2 * QUIET
        self.stock = 0

    def conserved(self) -> bool:
        return self.allocator.available_size() + self.tree.total_size()[0] == self.allocator.size


@pytest.fixture(autouse=True)
def _on_one_rank() -> Iterator[None]:
    with get_parallel().override(attn_tp_group=SimpleNamespace(world_size=1)):
        yield


@pytest.fixture(params=["python", "rust"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> IdleScheduler:
    """`PROMPT` is cached as pruned, and waits; a step takes `STEP` tokens."""
    with envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override(request.param):
        made = IdleScheduler()
    monkeypatch.setattr(finishing, "config_of", lambda _: msgspec.structs.replace(CONFIG, finish_chunk=STEP))
    monkeypatch.setattr(finishing, "_compute", made.compute)
    made.cache(PROMPT, pruned=True)
    made.wait()
    return made


def test_a_round_of_the_event_loop_runs_one_step(world: IdleScheduler) -> None:
    for end in (STEP, 2 * STEP, len(PROMPT)):
        assert len(world.finishing.queue) == 1
        world.on_idle()
        assert world.cached(pruned=False) == end and world.stock == 0 and world.conserved()
        finished = len(PROMPT) if end == len(PROMPT) else 0  # requests are told when it is all there
        assert world.finishing.finished.length(PROMPT, sharers(None, None)) == finished // 128 * 128
    assert world.forwards == [(0, STEP), (STEP, 2 * STEP), (2 * STEP, len(PROMPT))]
    assert len(world.finishing.queue) == 0 and world.cached(pruned=True) == 0  # its pruned copy was let go
    stats = world.finishing.stats()
    assert (stats["finished"], stats["tokens"], stats["dropped"]) == (1, len(PROMPT), 0)
    world.on_idle()
    assert world.stock == 1 and len(world.forwards) == 3


def test_metrics_are_written_after_a_step(world: IdleScheduler) -> None:
    world.metrics_collector, written = SimpleNamespace(), []
    publish = SimpleNamespace(publish=lambda: written.append(world.finishing.stats()["steps"]))
    attached.metrics.hang(world.metrics_collector, publish)
    world.on_idle(2)
    assert written == [1, 2]


def test_stock_runs_while_no_step_is_due(world: IdleScheduler) -> None:
    world.forward_ct += 1  # somebody else's
    world.on_idle(3)
    assert world.stock == 3 and not world.forwards
    world.now += 2 * QUIET
    world.idle = False
    world.on_idle()
    assert world.stock == 4 and not world.forwards
    world.idle = True
    world.on_idle()
    assert world.stock == 4 and len(world.forwards) == 1


def test_without_finishing_stock_is_stock(world: IdleScheduler) -> None:
    attached.finishing.hang(world.pool, None)  # type: ignore[arg-type]
    slept = []
    finishing.stay_awake(slept.append, world)
    world.on_idle()
    assert world.stock == 1 and slept == [world] and not world.forwards


def test_a_scheduler_sleeps_when_nothing_waits(world: IdleScheduler) -> None:
    slept: list[Any] = []
    finishing.stay_awake(slept.append, world)
    assert not slept
    world.finishing.queue.clear()
    finishing.stay_awake(slept.append, world)
    assert slept == [world]


def test_what_fails_is_dropped_and_logged_and_stock_goes_on(
    world: IdleScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    world.on_idle()
    world.fails = True
    with caplog.at_level(logging.ERROR):
        world.on_idle()
    assert "could not finish a prefix of 1500 tokens; it stays pruned" in caplog.text and "planted" in caplog.text
    assert world.finishing.queue.dropped == 1 and len(world.finishing.queue) == 0
    assert world.conserved() and (world.cached(pruned=True), world.cached(pruned=False)) == (len(PROMPT), STEP)
    world.on_idle()
    assert world.stock == 1


def test_a_prefix_that_is_gone_is_dropped(world: IdleScheduler) -> None:
    world.tree.reset()
    world.on_idle()
    assert not world.forwards and len(world.finishing.queue) == 0 and world.finishing.queue.dropped == 1
    assert world.stock == 1 and world.finishing.steps == 0


def test_a_prefix_that_is_finished_already_is_no_loss(world: IdleScheduler) -> None:
    """A request that had to be pruned left it once more."""
    world.on_idle(3)
    world.cache(PROMPT, pruned=True)
    world.finishing.queue.add(PREFIX)
    world.on_idle()
    assert len(world.forwards) == 3 and len(world.finishing.queue) == world.finishing.queue.dropped == 0
    assert world.cached(pruned=True) == 0  # the copy goes, as nobody goes on from it


def test_what_little_is_left_is_finished_too(world: IdleScheduler) -> None:
    """It takes one step, and frees the pruned copy of all that was dense before."""
    world.cache(PROMPT[: len(PROMPT) - 100], pruned=False)  # a dense request of a client's left it
    world.on_idle()
    assert world.forwards == [(len(PROMPT) - 100, len(PROMPT))] and len(world.finishing.queue) == 0
    assert world.cached(pruned=True) == 0 and world.cached(pruned=False) == len(PROMPT)


def test_a_prefix_without_room_is_dropped_and_evicts_none_of_its_own(world: IdleScheduler) -> None:
    taken = world.allocator.alloc(world.allocator.available_size() - STEP)
    world.on_idle()
    assert not world.forwards and world.finishing.queue.dropped == 1
    world.allocator.free(taken)
    assert world.conserved()


def test_a_step_needs_one_slot_more_than_it_has_tokens(world: IdleScheduler) -> None:
    """For the token that the early layers see, where nothing can be evicted."""
    world.tree.lock(finishing._cached(world.tree, PREFIX, is_dense=False).node)
    world.allocator.alloc(world.allocator.available_size() - STEP)
    world.on_idle()
    assert not world.forwards and world.finishing.queue.dropped == 1


def test_older_entries_are_evicted_for_a_step(world: IdleScheduler) -> None:
    other = Prefix(array("q", [7] * 3000), KEY)
    world.cache(list(other.tokens), pruned=True)
    world.way(world.request(PROMPT, policy="always"))  # used after it
    taken = world.allocator.alloc(world.allocator.available_size() - 10)
    world.on_idle()
    assert world.forwards == [(0, STEP)] and world.cached(pruned=True) == len(PROMPT)
    assert world.cached(pruned=True, prefix=other) < 3000
    world.allocator.free(taken)
    assert world.conserved()


def test_clients_have_their_own(world: IdleScheduler) -> None:
    """A key of theirs leads from their pruned namespace to their dense one."""
    own = Prefix(array("q", PROMPT), (pruned_key("client", CONFIG.namespace), None))
    assert world.cached(pruned=True, prefix=own) == 0
    world.on_idle(3)
    assert world.cached(pruned=False) == len(PROMPT) and world.cached(pruned=False, prefix=own) == 0
