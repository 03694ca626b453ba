"""A request's radix namespace, and how it leaves the pruned one, on SGLang's own classes, without a server."""

from __future__ import annotations

import itertools
from array import array

import pytest

from claa_sglang.patches import requests
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
    req.claa, req.extra_key = pruned(), requests.pruned_key(key, CONFIG.namespace)
    req.origin_input_ids = array("q", [0])  # what SGLang runs in place of the prompt
    requests.leave_on_abort(None, req, "message")
    assert req.claa.reason == requests.ABORTED and req.claa.prompt_tokens == 1
    assert req.extra_key == requests.dense_key(key)
    requests.leave_on_abort(None, req, "message")
    assert req.extra_key == requests.dense_key(key)
