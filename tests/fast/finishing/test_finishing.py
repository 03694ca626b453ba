"""When a step of finishing is due, by a clock that the test moves."""

from __future__ import annotations

from array import array

import pytest

from claa_sglang.finishing.finishing import BUSY, BUSY_QUIET, BUSY_SECONDS, QUIET, Finishing
from claa_sglang.finishing.queue import Prefix
from claa_sglang.policy.prefix_uses import BLOCK

PREFIX = Prefix(array("q", [1] * 1000), ("claa:x", None))


class Clock:
    """Seconds that the test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def finishing(clock: Clock) -> Finishing:
    """Something waits, and three forwards ran just now."""
    made = Finishing(clock=clock)
    made.queue.add(PREFIX)
    assert not made.is_due(3)
    return made


def test_no_step_is_due_before_it_was_quiet(finishing: Finishing, clock: Clock) -> None:
    clock.now += 0.9 * QUIET
    assert not finishing.is_due(3)
    clock.now += 0.2 * QUIET
    assert finishing.is_due(3)


def test_a_forward_of_somebody_else_starts_the_wait_anew(finishing: Finishing, clock: Clock) -> None:
    for forwards in (4, 5):
        clock.now += 2 * QUIET
        assert not finishing.is_due(forwards)
    clock.now += 0.9 * QUIET
    assert not finishing.is_due(5)
    clock.now += 0.2 * QUIET
    assert finishing.is_due(5)


def test_a_step_of_ours_does_not(finishing: Finishing, clock: Clock) -> None:
    clock.now += 2 * QUIET
    for forwards in (4, 5):
        assert finishing.is_due(forwards - 1)
        finishing.ran(forwards)
    assert finishing.is_due(5) and not finishing.is_due(6)


@pytest.mark.parametrize(("gap", "wait"), [(BUSY_SECONDS / BUSY, BUSY_QUIET), (BUSY_SECONDS, QUIET)])
def test_where_requests_keep_coming_the_wait_is_longer(
    finishing: Finishing, clock: Clock, gap: float, wait: float
) -> None:
    """Though nothing was quiet between them."""
    for _ in range(BUSY):
        clock.now += gap
        finishing.ended()
    assert not finishing.is_due(4)
    clock.now += 0.9 * wait
    assert not finishing.is_due(4)
    clock.now += 0.2 * wait
    assert finishing.is_due(4)


def test_one_request_after_a_pause_is_no_crowd(finishing: Finishing, clock: Clock) -> None:
    for _ in range(BUSY):
        clock.now += 0.01
        finishing.ended()
    clock.now += 2 * BUSY_SECONDS
    assert not finishing.is_due(100)
    clock.now += 1.1 * QUIET
    assert finishing.is_due(100)


def test_nothing_is_due_where_nothing_waits(finishing: Finishing, clock: Clock) -> None:
    clock.now += 2 * QUIET
    finishing.queue.remove(PREFIX)
    assert not finishing.is_due(3)
    finishing.queue.add(PREFIX)
    assert finishing.is_due(3)  # it was quiet all the while


def test_an_emptied_prefix_cache_has_nothing_to_finish(finishing: Finishing) -> None:
    finishing.finished.add(PREFIX.tokens, "")
    assert finishing.finished.length(PREFIX.tokens, "") == 7 * BLOCK
    finishing.clear()
    assert len(finishing.queue) == finishing.finished.length(PREFIX.tokens, "") == 0


def test_the_numbers_that_a_server_shows(finishing: Finishing) -> None:
    expected = {"waiting": 1, "finished": 0, "dropped": 0, "tokens": 0, "steps": 0, "seconds": 0}
    assert finishing.stats() == expected
    finishing.ran(4)
    finishing.queue.dropped, finishing.prefixes, finishing.tokens, finishing.seconds = 2, 3, 5000, 1.23456
    assert finishing.stats() == {
        **expected,
        **{"dropped": 2, "finished": 3, "tokens": 5000, "steps": 1, "seconds": 1.235},
    }
