"""What is freed of a prefix that was finished, and what waits at a request's end, on SGLang's own prefix cache."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req

from claa_sglang.finishing.finishing import Finishing
from claa_sglang.finishing.queue import Prefix
from claa_sglang.patches import attached
from claa_sglang.patches.finishing import _cached, _let_go, forget, remember
from claa_sglang.patches.requests import make_dense
from tests.fast.patches.world import CONFIG, PROMPT, World

KEY = (CONFIG.namespace, None)
SYSTEM, OTHER = PROMPT[:600], [*PROMPT[:600], *[7] * 500]


@pytest.fixture(params=["python", "rust"])
def world(request: pytest.FixtureRequest) -> World:
    """`PROMPT` is cached either way."""
    with envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override(request.param):
        made = World()
    made.cache(PROMPT, pruned=True)
    made.cache(PROMPT, pruned=False)
    return made


def prefix(tokens: list[int] = PROMPT) -> Prefix:
    return Prefix(array("q", tokens), KEY)


def cached(world: World, tokens: list[int] = PROMPT, dense: bool = False) -> int:
    return _cached(world.tree, prefix(tokens), is_dense=dense).tokens


def freed(world: World, tokens: list[int] = PROMPT) -> int:
    """Slots that letting go of `tokens` gives back; none is lost, and none of the dense copy."""
    before = world.allocator.available_size()
    _let_go(world.tree, prefix(tokens))
    assert cached(world, dense=True) == len(PROMPT)
    after = world.allocator.available_size()
    assert after + world.tree.total_size()[0] == world.allocator.size
    return after - before


def test_a_prefix_that_nobody_continues_is_freed(world: World) -> None:
    assert freed(world) == len(PROMPT) and cached(world) == 0
    assert freed(world) == 0  # again


def test_all_its_nodes_are(world: World) -> None:
    """A prompt and its answer are several; so is a prompt of which another was the beginning."""
    world.cache([*PROMPT, *range(5000, 5700)], pruned=True)
    assert freed(world, [*PROMPT, *range(5000, 5700)]) == len(PROMPT) + 700 and cached(world) == 0


def test_what_another_prefix_goes_on_from_stays(world: World) -> None:
    world.cache(OTHER, pruned=True)
    assert freed(world) == len(PROMPT) - len(SYSTEM)
    assert cached(world) == len(SYSTEM) and cached(world, OTHER) == len(OTHER)
    assert freed(world, OTHER) == len(OTHER) and cached(world) == 0


def test_a_prefix_that_is_continued_stays_whole(world: World) -> None:
    world.cache([*PROMPT, *range(5000, 5700)], pruned=True)
    assert freed(world) == 0 and cached(world) == len(PROMPT)


def test_a_prefix_that_ends_inside_of_another_is_the_other_s(world: World) -> None:
    assert freed(world, SYSTEM) == 0 and cached(world) == len(PROMPT)


def test_nothing_is_freed_while_something_is_protected(world: World) -> None:
    lock = world.tree.lock(_cached(world.tree, prefix(), is_dense=True).node)
    assert freed(world) == 0 and cached(world) == len(PROMPT)
    world.tree.unlock(lock)
    assert freed(world) == len(PROMPT)


# --- what waits at a request's end


@pytest.fixture
def finishing(world: World) -> Finishing:
    return attached.finishing.hang(world.pool, Finishing())


def ended(world: World, **options: bool) -> Req:
    """A request that ended, 1,490 tokens of which are in the prefix cache."""
    req = world.request(PROMPT, **options)
    req.full_untruncated_fill_ids = array("q", [*PROMPT, 1, 2])
    req.kv.cache_protected_len, req.finished_reason = len(PROMPT) - 10, FINISH_LENGTH(2)
    return req


def waiting(world: World, req: Req) -> Prefix | None:
    finishing = attached.finishing.of(world.pool)
    finishing.queue.clear()
    marker = object()
    assert remember(marker, world.tree, req, up_to=len(PROMPT)) is marker
    return finishing.queue.first()


def test_what_a_pruned_request_leaves_at_its_end_waits(world: World, finishing: Finishing) -> None:
    req = ended(world)
    req.cache_salt, req.priority = "salt", 3
    assert waiting(world, req) == Prefix(array("q", PROMPT[:-10]), (CONFIG.namespace, "salt"), 3)
    forget(None, world.tree)
    assert len(finishing.queue) == 0


@pytest.mark.usefixtures("finishing")
def test_nothing_waits_that_is_not_to_be_finished(world: World) -> None:
    running, failed, session, unwanted, dense, aborted = (ended(world, finish=number != 3) for number in range(6))
    running.finished_reason = None  # a chunk of its prompt, or a retraction
    attached.state.of(failed).progress.error = "planted"
    session.session = SimpleNamespace()
    make_dense(dense, "a test")
    aborted.finished_reason = FINISH_ABORT("it hung up")
    for req in (running, failed, session, unwanted, dense, aborted):
        assert waiting(world, req) is None
    assert waiting(world, ended(world, finish=True)) is not None


def test_that_a_request_ended_is_noted_of_any_but_not_of_a_chunk(world: World, finishing: Finishing) -> None:
    """So that steps know whether requests keep coming."""
    pruned, dense, running = (ended(world) for _ in range(3))
    make_dense(dense, "a test")
    running.finished_reason = None
    counted = []
    for req in (pruned, dense, running):
        before = list(finishing.ends)
        remember(None, world.tree, req, up_to=len(PROMPT))
        counted.append(list(finishing.ends) != before)
    assert counted == [True, True, False]


@pytest.mark.usefixtures("finishing")
def test_nothing_waits_without_a_prefix_cache(world: World) -> None:
    world.tree.disable = True
    assert waiting(world, ended(world)) is None


def test_nothing_is_remembered_without_finishing(world: World) -> None:
    assert remember(7, world.tree, ended(world)) == 7 and forget(7, world.tree) == 7
