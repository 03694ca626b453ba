"""A request's radix namespace, and how it leaves the pruned one, on SGLang's own classes, without a server."""

from __future__ import annotations

import itertools
from array import array

import pytest

from claa_sglang.patches import attached, requests
from claa_sglang.requests import dense_rules
from tests.fast.states import CONFIG, pruned

CLIENT_KEYS = [
    None,
    "a",
    "b|a",
    "|",
    "a|",
    "claa:",
    "claa:p3",
    "claa:p3|",
    "claa:p3|a",
    "claa:dense|a",
    "claa:dense|",
]


def test_no_client_key_leads_into_another_namespace() -> None:
    made = [requests.pruned_key(key, CONFIG.namespace) for key in CLIENT_KEYS]
    made += [requests.dense_key(key) for key in CLIENT_KEYS]
    assert all(left != right for left, right in itertools.combinations(made, 2))
    assert CONFIG.namespace.startswith(requests.MARK) and "|" not in CONFIG.namespace


def test_a_dense_request_keeps_the_client_s_key() -> None:
    for key in (None, "", "a", "b|a"):
        assert requests.dense_key(key) == key


def test_the_client_s_key_can_be_read_back() -> None:
    assert [requests.client_key(requests.pruned_key(key, CONFIG.namespace)) for key in CLIENT_KEYS] == CLIENT_KEYS


@pytest.mark.parametrize("key", [None, "a", "claa:p3"])
def test_an_aborted_request_becomes_dense_and_leaves_the_pruned_namespace(key: str | None) -> None:
    from sglang.srt.managers.schedule_batch import Req

    req = Req.__new__(Req)
    attached.state.hang(req, pruned())
    req.extra_key = requests.pruned_key(key, CONFIG.namespace)
    req.origin_input_ids = array("q", [0])  # what SGLang runs in place of the prompt
    requests.leave_on_abort(None, req, "message")
    state = attached.state.of(req)
    assert state.plan.dense_reason == dense_rules.ABORTED and state.plan.prompt_tokens == 1
    assert req.extra_key == requests.dense_key(key)
    requests.leave_on_abort(None, req, "message")
    assert req.extra_key == requests.dense_key(key)


@pytest.mark.parametrize("dynamo_format", [False, True])
def test_sglang_s_block_events_do_not_name_the_namespace(dynamo_format: bool) -> None:
    """Why `--kv-events-config` is refused: to a router that goes by tokens, pruned and dense blocks are one."""
    import torch
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.events import KVCacheEventRecorder
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    cache = RadixCache.create_simulated()
    cache.kv_events = KVCacheEventRecorder(enabled=True, page_size=1, dynamo_format=dynamo_format)
    for key in (None, requests.pruned_key(None, CONFIG.namespace)):
        cache.insert(InsertParams(key=RadixKey(array("q", [1, 2, 3]), key), value=torch.arange(3)))
    dense, pruned_event = cache.kv_events.take()
    assert (dense.block_hashes == pruned_event.block_hashes) is not dynamo_format
    pruned_event.block_hashes = dense.block_hashes
    assert pruned_event == dense and dense.token_ids == [1, 2, 3]
