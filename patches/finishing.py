"""Answer first, finish later: while nothing runs, the late layers of dropped tokens are computed, prefix by prefix.

A step is one prefill forward of a request of our own: pruned, keep rate 1, over the first `end` tokens of a prefix
that a pruned request left in the prefix cache. Its early layers would see one page, whose KV and boundary states are
copied from the cache, so they are left out; its late layers see tokens [start, end), from their boundary states, over
the late KV of [0, start), which is dense and in the cache already. So a step computes what the last parts of any late
prefill compute (`late_prefill.py`), bit for bit, and no state is kept from one step to the next: each looks up both
namespaces, and what it computed is in the dense one when it ends. The early KV is copied beside it.

Steps run one at a time, from `Scheduler.on_idle`, and are waited for. A request that arrives waits for that step alone.
"""

from __future__ import annotations

import logging
from array import array
from typing import Any, NamedTuple

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import BASE_COMPONENT_TYPE
from sglang.srt.sampling.sampling_params import SamplingParams
from torch import Tensor

from claa_sglang.finishing.finishing import Finishing
from claa_sglang.finishing.queue import Prefix
from claa_sglang.finishing.step_size import step_tokens
from claa_sglang.memory.kv_rows import move
from claa_sglang.memory.pages import Pages
from claa_sglang.patches import attached
from claa_sglang.patches.checks import note_dense
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.metrics import publish
from claa_sglang.patches.policy import NO_CHUNK, live_policy
from claa_sglang.patches.ranks import is_alone
from claa_sglang.patches.requests import client_key, dense_key, pruned_state, sharers
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState
from claa_sglang.start.server_config import config_of

logger = logging.getLogger(__name__)


class StepFailed(RuntimeError):
    """A step failed in what CLAA computes itself, on every rank."""


class Cached(NamedTuple):
    """How many of a prefix's first tokens are in the prefix cache, and the node in which they end."""

    tokens: int
    node: Any


def remember(result: Any, self: Any, req: Any, **_kwargs: Any) -> Any:
    """AFTER `UnifiedRadixCache.checkpoint_into_tree`: what a pruned request leaves at its end waits to be finished.

    That a request ended is noted of any.
    """
    finishing = attached.finishing.find(self.req_to_token_pool)
    if finishing is None or not req.finished() or not self.supports_prefix_sharing():
        return result
    finishing.ended()
    if (state := pruned_state(req)) is None:
        return result
    if isinstance(req.finished_reason, FINISH_ABORT) or req.session is not None:
        return result  # nobody goes on from it, or a session of SGLang's keeps it
    if state.plan.options.finish and state.progress.error is None:
        tokens = req.full_untruncated_fill_ids[: req.kv.cache_protected_len]
        finishing.queue.add(Prefix(tokens, (req.extra_key, req.cache_salt), req.priority or 0))
    return result


def forget(result: Any, self: Any) -> Any:
    """AFTER `UnifiedRadixCache.reset`: nothing is cached any more, so nothing waits."""
    if (finishing := attached.finishing.find(self.req_to_token_pool)) is not None:
        finishing.clear()
    return result


def finish_some(original: Any, self: Any) -> Any:
    """AROUND `Scheduler.on_idle`, which the event loops call when there is nothing to run: one step, if one is due."""
    finishing = attached.finishing.find(self.req_to_token_pool)
    if finishing is None:
        return original(self)
    alone = is_alone()
    is_due = finishing.is_due if alone else finishing.is_granted
    if not is_due(self.forward_ct) or not self.is_fully_idle():
        return original(self)
    prefix = finishing.queue.first()
    assert prefix is not None
    start = finishing.clock()
    computed = True
    try:
        computed = _step(self, finishing, prefix)
    except Exception as error:
        if not (alone or isinstance(error, StepFailed)):
            raise  # other ranks may wait for this one in a reduction
        # Nobody waits for this prefix. Its slots are back, and it stays what it is.
        logger.exception("CLAA could not finish a prefix of %d tokens; it stays pruned", len(prefix.tokens))
        _drop(finishing, prefix)
    if not computed:
        return original(self)
    finishing.seconds += finishing.clock() - start
    finishing.ran(self.forward_ct)
    publish(None, self.metrics_collector)
    return None


def stay_awake(original: Any, self: Any) -> Any:
    """AROUND `Scheduler.maybe_sleep_on_idle` (`--sleep-on-idle`): not while a prefix waits to be finished."""
    finishing = attached.finishing.find(self.req_to_token_pool)
    return original(self) if finishing is None or not len(finishing.queue) else None


def _step(scheduler: Any, finishing: Finishing, prefix: Prefix) -> bool:
    """Make some more of the prefix dense; False where nothing was computed, and it left the queue: it is dense, or
    gone, or there is no room."""
    tree = scheduler.tree_cache
    pruned, dense = _cached(tree, prefix, is_dense=False), _cached(tree, prefix, is_dense=True)
    left = pruned.tokens - dense.tokens
    if left <= 0:  # it was evicted, or somebody ran dense over it
        finishing.queue.remove(prefix)
        finishing.queue.dropped += dense.tokens < len(prefix.tokens)
        _let_go(tree, prefix)
        return False
    config = config_of(scheduler.server_args)
    live = live_policy(scheduler.req_to_token_pool)
    assert live is not None  # the model is loaded: requests ran
    chunk = scheduler.chunked_prefill_size or NO_CHUNK
    pages = Pages(tree.page_size)
    count = pages.round_up(step_tokens(config, live.policy.cost, dense.tokens, left, chunk))
    # One page more for the last one, which the forward has rows for. Eviction takes the least recently used, so it
    # reaches this prefix, which looking up does not touch, only when nothing older is left.
    evict_from_tree_cache(tree, count + pages.size)
    pruned, dense = _cached(tree, prefix, is_dense=False), _cached(tree, prefix, is_dense=True)
    end = dense.tokens + count
    if scheduler.token_to_kv_pool_allocator.available_size() < count + pages.size or pruned.tokens < end:
        _note(finishing, prefix, dense.tokens)
        _drop(finishing, prefix)
        return False
    slots = scheduler.token_to_kv_pool_allocator.alloc(count)
    try:
        _compute(scheduler, prefix, pruned, dense, slots)
    except BaseException:
        scheduler.token_to_kv_pool_allocator.free(slots)
        raise
    _donate(tree, prefix, dense, slots)
    finishing.tokens += count
    if end == pruned.tokens:
        finishing.queue.remove(prefix)
        finishing.prefixes += 1
        _note(finishing, prefix, end)
        _let_go(tree, prefix)
    return True


def _note(finishing: Finishing, prefix: Prefix, end: int) -> None:
    """The first `end` tokens are dense, and that is all that will be of them: requests that follow can know."""
    key, salt = prefix.key
    finishing.finished.add(prefix.tokens[:end], sharers(client_key(key), salt))


def _drop(finishing: Finishing, prefix: Prefix) -> None:
    finishing.queue.remove(prefix)
    finishing.queue.dropped += 1


def _radix_key(prefix: Prefix, end: int, is_dense: bool) -> RadixKey:
    key, salt = prefix.key
    return RadixKey(prefix.tokens[:end], dense_key(client_key(key)) if is_dense else key, cache_salt=salt)


def _cached(tree: Any, prefix: Prefix, is_dense: bool) -> Cached:
    """What is cached of a prefix in either namespace. Looking is no use: it does not make anything recently used."""
    key = _radix_key(prefix, len(prefix.tokens), is_dense)
    tokens, node, _ = tree.tree_core.match_full_device_prefix(key)
    return Cached(tokens, node)


def _compute(scheduler: Any, prefix: Prefix, pruned: Cached, dense: Cached, slots: Tensor) -> None:
    """Dense KV of the tokens from `dense` on into `slots` (int64 `[n]`). Raises what its forward raised."""
    tree, pool = scheduler.tree_cache, scheduler.req_to_token_pool
    config, runner = config_of(scheduler.server_args), scheduler.tp_worker.model_runner
    start, end = dense.tokens, dense.tokens + len(slots)
    before = tree.path_device_indices(pruned.node)[:end]
    after = torch.cat((tree.path_device_indices(dense.node)[:start], slots))
    for layer in range(config.steps[0].prune_layer + 1):
        for buffer in (runner.token_to_kv_pool.get_key_buffer(layer), runner.token_to_kv_pool.get_value_buffer(layer)):
            move(buffer, before[start:], slots)
    state = RequestState.pruned_request(RequestOptions(keep_rate=1.0, policy="always"), config, end)
    state.progress.late_spans = [(start, end)] * len(state.plan.steps)
    state.progress.last_slots, state.progress.borrowed = before[-tree.page_size :], after
    req = _request(scheduler, prefix, pruned, end, state)
    try:
        batch = ScheduleBatch.init_new(
            [req],
            pool,
            scheduler.token_to_kv_pool_allocator,
            tree,
            scheduler.model_config,
            scheduler.enable_overlap,
            scheduler.spec_algorithm,
        )
        batch.prepare_for_extend()
        scheduler.run_batch(batch)
        scheduler.device_module.synchronize()
    finally:
        if req.kv.holds_kv:
            release_kv_cache(req, tree, checkpoint=False)
    if state.progress.error is not None:
        raise StepFailed(state.progress.error)
    note_dense(pool, before, after, start)


def _request(scheduler: Any, prefix: Prefix, pruned: Cached, end: int, state: RequestState) -> Req:
    """A request whose prefill has its last page left: what admission would have made of it."""
    key, salt = prefix.key
    params = SamplingParams(max_new_tokens=0, temperature=0.0)
    params.normalize(None)
    req = Req(
        rid=f"claa-finishing-{scheduler.forward_ct}",
        origin_input_text="",
        origin_input_ids=array("q", prefix.tokens[:end]),
        sampling_params=params,
        vocab_size=scheduler.model_config.vocab_size,
        extra_key=key,
        cache_salt=salt,
    )
    attached.state.hang(req, state)
    req.refresh_fill_ids()
    assert state.progress.last_slots is not None
    start = end - len(state.progress.last_slots)
    req.last_node, req.prefix_len, req.extend_end = pruned.node, start, end
    req.kv.cache_protected_len = start
    return req


def _donate(tree: Any, prefix: Prefix, dense: Cached, slots: Tensor) -> None:
    """The prefix cache owns `slots` from now on, as dense KV that goes on where `dense` ends."""
    start, end = dense.tokens, dense.tokens + len(slots)
    value = torch.cat((tree.path_device_indices(dense.node)[:start], slots))
    key = _radix_key(prefix, end, is_dense=True)
    tree.insert(InsertParams(key=key, value=value, prev_prefix_len=start, inserted_len=start, priority=prefix.priority))


def _let_go(tree: Any, prefix: Prefix) -> None:
    """Free the pruned copy of a prefix, from its end as far as no other prefix goes on from it."""
    if tree.protected_size():
        return  # somebody holds on to something: leave it to eviction
    pruned = _cached(tree, prefix, is_dense=False)
    if not pruned.tokens:
        return
    (path,) = tree.tree_core.collect_path_info([pruned.node])
    freed = {BASE_COMPONENT_TYPE: 0}
    for node, children in zip(reversed(path), [0] + [1] * len(path), strict=False):
        if node.path_end > pruned.tokens or node.num_children > children:
            return
        tree._evict_device_leaf(node.node_id, freed)


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.on_idle",
        ("self",),
        "around",
        finish_some,
        "scheduler",
        "Both event loops come here when there is nothing to run: pruned prefixes are made dense then.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.maybe_sleep_on_idle",
        ("self",),
        "around",
        stay_awake,
        "scheduler",
        "With --sleep-on-idle a scheduler that waits for requests does nothing else.",
    ),
    Hook(
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree",
        ("self", "req", "up_to", "kwargs"),
        "after",
        remember,
        "scheduler",
        "What a pruned request leaves in the prefix cache is known where it is put there.",
    ),
    Hook(
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.reset",
        ("self",),
        "after",
        forget,
        "scheduler",
        "An emptied prefix cache has nothing to finish.",
    ),
)
