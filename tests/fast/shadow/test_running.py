"""When shadow requests are asked: random schedules of answers, clients, operations and updates, on a real event loop.

The server here answers when the schedule says so; `tests/engine/test_shadow.py` has SGLang's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_sglang.shadow.agreement import Agreement
from claa_sglang.shadow.running import RID, TRIES, Shadows, is_shadow
from claa_sglang.shadow.waiting import Shadow, Waiting
from tests.fast.shadow.test_waiting import shadow

SAME, DIFFERENT = Agreement(3, 3, 3, -1.0), Agreement(3, 2, 1, -9.0)


class World:
    """A server, its clients, and what became of each shadow request."""

    def __init__(self, most: int = 3) -> None:
        self.clients, self.leaving, self.reaches = 0, False, True
        self.held = 0
        self.wrong: list[str] = []
        self.running: dict[str, tuple[Shadow, asyncio.Future[Agreement | None]]] = {}
        self.settled: list[tuple[Shadow, str, Agreement | None]] = []
        self.offered: list[Shadow] = []
        self.shadows = Shadows(self, lambda *what: self.settled.append(what), Waiting(most, 10**6), quiet=0, poll=0)

    def is_idle(self) -> bool:
        return not self.clients

    def is_leaving(self) -> bool:
        return self.leaving

    async def answer(self, asked: Shadow, rid: str) -> Agreement | None:
        # An error here would be one of the server's.
        if self.clients or self.held or self.running:
            self.wrong.append("it is in the way")
        if not (is_shadow(rid) and self.shadows.asks(rid) and asked.weights == self.shadows.weights):
            self.wrong.append("it is not the one that runs, or of other weights")
        self.running[rid] = (asked, asyncio.get_running_loop().create_future())
        try:
            return await self.running[rid][1]
        finally:
            del self.running[rid]

    def abort(self, rid: str) -> bool:
        if self.reaches and rid in self.running and not self.running[rid][1].done():
            self.running[rid][1].set_result(None)
            return True
        return False

    async def turn(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)

    def offer(self) -> None:
        self.offered.append(shadow(5, answer=2, weights=self.shadows.weights))
        self.shadows.offer(self.offered[-1])

    def arrive(self) -> None:
        self.clients += 1
        self.shadows.client_arrives()

    def finish(self, result: Agreement | None | Exception) -> None:
        for _, future in self.running.values():
            if not future.done():
                future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

    def results(self) -> list[str]:
        return [result for _, result, _ in self.settled]


def run(schedule: Callable[[World], Awaitable[None]]) -> World:
    async def all_of_it() -> World:
        world = World()
        await schedule(world)
        assert world.wrong == []
        return world

    return asyncio.run(all_of_it())


ACTIONS = st.lists(
    st.sampled_from(
        ["offer", "offer", "arrive", "leave", "same", "different", "aborted", "fails", "hold", "update", "turn", "turn"]
    ),
    max_size=40,
)


@settings(deadline=None)
@given(ACTIONS, st.booleans())
def test_it_is_never_in_the_way_and_each_is_settled_once(actions: list[str], reaches: bool) -> None:
    async def schedule(world: World) -> None:
        world.reaches = reaches
        for action in actions:
            match action:
                case "offer":
                    world.offer()
                case "arrive":
                    world.arrive()
                case "leave":
                    world.clients = max(0, world.clients - 1)
                case "same":
                    world.finish(SAME)
                case "different":
                    world.finish(DIFFERENT)
                case "aborted":
                    world.finish(None)
                case "fails":
                    world.finish(RuntimeError("planted"))
                case "hold":
                    async with world.shadows.held():
                        assert not world.running
                        world.held += 1
                        await world.turn()
                        world.held -= 1
                case "update":
                    world.shadows.forget()
                    async with world.shadows.held():
                        assert not world.running
                case "turn":
                    await world.turn()
        world.clients = 0
        while len(world.settled) < len(world.offered):
            await world.turn()
            world.finish(SAME)

    world = run(schedule)
    assert sorted(map(id, world.offered)) == sorted(id(settled) for settled, _, _ in world.settled)
    for settled, result, found in world.settled:
        assert settled.tries <= TRIES
        assert (result in ("same", "different")) == (found is not None)
        assert found is None or (result == "same") == found.same
    assert not world.running and not len(world.shadows.waiting)


def test_one_that_was_ended_is_asked_again_and_dropped_in_the_end() -> None:
    async def schedule(world: World) -> None:
        world.offer()
        for tried in range(1, TRIES + 1):
            await world.turn()
            assert world.offered[0].tries == tried and len(world.running) == 1
            world.arrive()
            await world.turn()
            assert not world.running
            world.clients = 0
        await world.turn()

    assert run(schedule).results() == ["dropped"]


def test_one_that_did_not_reach_the_scheduler_is_cancelled() -> None:
    async def schedule(world: World) -> None:
        world.reaches = False
        world.offer()
        await world.turn()
        world.arrive()
        await world.turn()
        assert not world.running and not world.settled
        world.clients = 0
        await world.turn()
        world.finish(DIFFERENT)
        await world.turn()

    assert run(schedule).results() == ["different"]


@pytest.mark.parametrize("reaches", [True, False])
def test_an_operation_begins_when_it_is_gone_and_none_is_asked_meanwhile(reaches: bool) -> None:
    async def schedule(world: World) -> None:
        world.reaches = reaches
        world.offer()
        await world.turn()
        assert world.running
        async with world.shadows.held():
            assert not world.running
            await world.turn()
            assert not world.running and len(world.shadows.waiting) == 1
        await world.turn()
        world.finish(SAME)
        await world.turn()

    assert run(schedule).results() == ["same"]


def test_an_answer_that_was_there_when_a_client_came_counts() -> None:
    async def schedule(world: World) -> None:
        world.offer()
        await world.turn()
        world.finish(SAME)
        world.arrive()
        await world.turn()

    world = run(schedule)
    assert world.results() == ["same"] or world.offered[0].tries == 1


def test_an_update_drops_what_waits_runs_and_is_still_answered() -> None:
    async def schedule(world: World) -> None:
        late = shadow(5, answer=2, weights=world.shadows.weights)
        for _ in range(3):
            world.offer()
        await world.turn()
        assert len(world.running) == 1 and len(world.shadows.waiting) == 2
        world.shadows.forget()
        world.finish(SAME)  # of the old weights, and too late
        await world.turn()
        world.shadows.offer(late)
        await world.turn()

    world = run(schedule)
    assert world.results() == ["dropped"] * 4


def test_the_newest_win_and_what_fails_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async def schedule(world: World) -> None:
        world.arrive()
        for _ in range(5):
            world.offer()
        assert [settled for settled, _, _ in world.settled] == world.offered[:2]
        world.clients = 0
        await world.turn()
        world.finish(RuntimeError("planted"))
        await world.turn()
        assert world.settled[-1] == (world.offered[2], "failed", None)
        world.finish(SAME)
        await world.turn()
        world.finish(SAME)
        await world.turn()

    world = run(schedule)
    assert world.results() == ["dropped", "dropped", "failed", "same", "same"]
    assert "a shadow request failed: RuntimeError: planted" in caplog.text


def test_a_server_that_shuts_down_asks_nothing_more() -> None:
    async def schedule(world: World) -> None:
        world.offer()
        world.offer()
        await world.turn()
        world.leaving = True
        await world.turn()
        assert not world.running

    assert run(schedule).results() == ["dropped", "dropped"]


def test_a_client_that_goes_on_at_once_is_not_met() -> None:
    async def schedule() -> list[float]:
        world = World()
        world.shadows = Shadows(world, lambda *what: world.settled.append(what), quiet=0.1, poll=0.01)
        loop = asyncio.get_running_loop()
        world.offer()
        for _ in range(4):  # clients 0.05 seconds apart, each gone at once
            world.arrive()
            world.clients = 0
            await asyncio.sleep(0.05)
            assert not world.running
        start = loop.time()
        while not world.running:
            await asyncio.sleep(0.01)
        waited = loop.time() - start
        world.finish(SAME)
        while not world.settled:
            await asyncio.sleep(0.01)
        return [waited]

    (waited,) = asyncio.run(schedule())
    assert 0.03 < waited < 5


@pytest.mark.parametrize(("rid", "ours"), [(f"{RID}1", True), ("claa", False), (None, False), (["x"], False)])
def test_ids_of_shadow_requests(rid: object, ours: bool) -> None:
    assert is_shadow(rid) is ours
