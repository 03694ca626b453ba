"""What is cached of a request that decodes over kept tokens, what it computes anew, and when its row is listed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.managers.schedule_batch import Req

from claa_sglang.patches import attached
from claa_sglang.patches.forward_batch import _is_stale
from claa_sglang.patches.late_prefill import cache_prompt_alone, reprefill_window
from claa_sglang.patches.requests import make_dense
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState
from tests.fast.patches.world import CONFIG, PROMPT, World

GENERATED = 100


@pytest.fixture
def world() -> World:
    return World()


def request(world: World, restricted: bool) -> Req:
    """It has generated something."""
    req = world.request(PROMPT)
    config = msgspec.structs.replace(CONFIG, decode_dense_layers=4 if restricted else None)
    attached.state.hang(req, RequestState.pruned_request(RequestOptions(), config, len(PROMPT)))
    req.output_ids.extend(range(GENERATED))
    return req


@pytest.mark.parametrize(("restricted", "cached"), [(True, len(PROMPT)), (False, len(PROMPT) + GENERATED)])
def test_the_prompt_alone_is_cached(world: World, restricted: bool, cached: int) -> None:
    asked: list[int] = []

    def original(_tree: Any, _req: Req, *, up_to: int) -> None:
        asked.append(up_to)

    req = request(world, restricted)
    for up_to in (500, len(PROMPT), len(PROMPT) + GENERATED):
        cache_prompt_alone(original, world.tree, req, up_to=up_to)
    assert asked == [500, len(PROMPT), cached]
    make_dense(req, "for the test")
    cache_prompt_alone(original, world.tree, req, up_to=2000)
    assert asked[-1] == 2000


@pytest.mark.parametrize(("restricted", "tail"), [(True, GENERATED), (False, CONFIG.window)])
def test_what_it_generated_is_computed_anew_after_a_retraction(world: World, restricted: bool, tail: int) -> None:
    """Somebody's prompt may begin with prompt and answer, and have other KV for the answer."""
    req = request(world, restricted)
    assert reprefill_window(lambda _tree, _req: 0, world.tree, req) == tail
    assert reprefill_window(lambda _tree, _req: 5000, world.tree, req) == 5000
    del req.output_ids[:]
    assert reprefill_window(lambda _tree, _req: 0, world.tree, req) == CONFIG.window


def test_a_row_is_listed_first_and_when_slots_are_the_caches_own_since(world: World) -> None:
    req = request(world, restricted=True)
    state = attached.state.of(req)

    def stale(row: int, cached: int) -> bool:
        req.kv = SimpleNamespace(req_pool_idx=row, cache_protected_len=cached)
        return _is_stale(req, state)

    found = [stale(3, 1000), stale(3, 1000), stale(3, 1500), stale(3, 1500), stale(4, 1500), stale(4, 1500)]
    assert found == [True, False, True, False, True, False]
    state.progress.reset_scheduling()
    assert stale(4, 1500)
    assert not _is_stale(req, None) and not _is_stale(req, attached.state.of(request(world, restricted=False)))
