"""The way after a prefix that was finished, on SGLang's own request and prefix cache, without a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sglang.srt.managers.schedule_batch import Req

from claa_sglang.finishing.finishing import Finishing
from claa_sglang.patches import attached
from claa_sglang.patches.policy import choose_way, start_step
from claa_sglang.patches.requests import dense_key, sharers
from claa_sglang.policy.prefix_uses import BLOCK
from claa_sglang.requests.report import build_report
from tests.fast.patches.world import PROMPT, World

WHOLE = len(PROMPT) // BLOCK * BLOCK
NEXT = [*PROMPT, *range(5000, 5100)]  # the next turn


class IdleWorld(World):
    """With finishing, and `PROMPT` finished or still pruned."""

    def __init__(self, finished: bool) -> None:
        super().__init__()
        self.finishing = attached.finishing.hang(self.pool, Finishing())
        if finished:
            self.finishing.finished.add(PROMPT, sharers(None, None))
        self.cache(PROMPT, pruned=not finished)
        start_step(self.tree)

    @property
    def noted(self) -> float:
        """How many uses the share has seen, weighted: each makes it 0.9 of what it was, and 1."""
        return round(self.finishing.finished._uses, 6)


def said(req: Req) -> str | None:
    return attached.state.of(req).plan.dense_reason


@pytest.fixture
def finished() -> Iterator[IdleWorld]:
    yield IdleWorld(finished=True)


# --- --claa-policy always


def test_always_goes_dense_after_a_finished_prefix(finished: IdleWorld) -> None:
    req = finished.request(NEXT, policy="always")
    assert finished.way(req) == "dense" and req.prefix_len == len(PROMPT) and req.extra_key == dense_key(None)
    state = attached.state.of(req)
    report = build_report(state, req.prefix_len)
    assert report["finished_tokens"] == WHOLE and "policy" not in report and not state.decision.is_open
    assert report["reason"] == f"its first {WHOLE} tokens were finished while the server was idle: dense computes less"
    assert finished.way(req) == "dense" and build_report(state, req.prefix_len) == report  # considered again


def test_always_is_pruned_while_the_prefix_is(finished: IdleWorld) -> None:
    world = IdleWorld(finished=False)
    assert world.way(world.request(NEXT, policy="always")) == "pruned"
    assert finished.way(finished.request([7] * 1600, policy="always")) == "pruned"  # another prompt


def test_always_is_pruned_where_pruning_computes_less(finished: IdleWorld) -> None:
    req = finished.request([*PROMPT, *range(10_000, 22_000)], policy="always")
    assert finished.way(req) == "pruned"


def test_positions_that_a_client_gives_are_kept_whatever_was_finished(finished: IdleWorld) -> None:
    assert finished.way(finished.request(NEXT, policy="always", keep=(1, 2, 3))) == "pruned"


def test_a_request_that_holds_its_row_stays_what_it_is(finished: IdleWorld) -> None:
    req = finished.request(NEXT, policy="always")
    (req.kv.req_pool_idx,) = finished.pool.alloc_rows(1)
    assert req.kv.holds_kv and finished.way(req) == "pruned"


def test_so_does_one_that_was_retracted(finished: IdleWorld) -> None:
    req = finished.request(NEXT, policy="always")
    attached.state.of(req).progress.kept[0] = finished.allocator.alloc(1)
    assert finished.way(req) == "pruned"


def test_clients_of_another_salt_or_key_do_not_follow(finished: IdleWorld) -> None:
    salted, keyed = (finished.request(NEXT, policy="always") for _ in range(2))
    salted.cache_salt = "salt"
    keyed.extra_key += "|client"
    for req in (salted, keyed):
        assert finished.way(req) == "pruned" and attached.state.of(req).decision.finished == 0


def test_always_teaches_nothing_of_the_share(finished: IdleWorld) -> None:
    before = finished.noted
    finished.way(finished.request(NEXT, policy="always"))
    assert finished.noted == before


# --- --claa-policy auto


@pytest.mark.parametrize("in_time", [True, False])
def test_auto_notes_once_per_request_whether_it_was_in_time(in_time: bool) -> None:
    world = IdleWorld(finished=in_time)
    before = world.finishing.finished.share
    req = world.request(NEXT)
    for _ in range(5):
        choose_way(req, world.tree)
    assert world.noted == 0.9 + 1
    assert (world.finishing.finished.share > before) == in_time
    world.way(world.request(NEXT))
    assert world.noted == round(0.9 * (0.9 + 1) + 1, 6)


def test_auto_says_that_the_prefix_was_finished(finished: IdleWorld) -> None:
    req = finished.request(NEXT)
    assert finished.way(req) == "dense"
    report = build_report(attached.state.of(req), req.prefix_len)
    assert report["finished_tokens"] == WHOLE and report["policy"] == "auto"
    assert report["reason"].startswith(f"its first {WHOLE} tokens were finished while the server was idle: pruned ")


@pytest.mark.parametrize("prompt", [[7] * 1600, [*PROMPT[:140], *[7] * 1460]], ids=["nothing", "little"])
@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "pruned"])
def test_a_prompt_that_nobody_left_teaches_nothing_of_the_share(prompt: list[int], is_finished: bool) -> None:
    """A system prompt is used by everybody."""
    world = IdleWorld(is_finished)
    world.way(world.request(prompt))
    assert world.noted == 1


def test_without_finishing_nothing_is_looked_up() -> None:
    world = World()
    world.cache(PROMPT, pruned=False)
    start_step(world.tree)
    req = world.request(NEXT)
    assert world.way(req) == "dense" and "finished" not in str(said(req))
    assert "finished_tokens" not in build_report(attached.state.of(req), 0)
    assert world.way(world.request(NEXT, policy="always")) == "pruned"
