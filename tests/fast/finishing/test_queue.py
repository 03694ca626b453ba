"""The queue of pruned prefixes against a plain list, whatever happens to it."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from claa_sglang.finishing.queue import FinishQueue, Prefix

FLOOR, CAPACITY = 2, 12
KEYS: list[tuple[str, str | None]] = [("claa:one", None), ("claa:one", "salt"), ("claa:two", None)]

# Few tokens and short prompts, so that many are equal or go on where another ends.
tokens = st.lists(st.integers(1, 2), max_size=5)
keys = st.sampled_from(KEYS)


def prefix(numbers: list[int], key: tuple[str, str | None] = KEYS[0], priority: int = 0) -> Prefix:
    return Prefix(array("q", numbers), key, priority)


class QueueMachine(RuleBasedStateMachine):
    """The model is a list, the next one last."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FinishQueue(FLOOR, CAPACITY)
        self.model: list[Prefix] = []
        self.dropped = 0

    @rule(numbers=tokens, key=keys, priority=st.integers(0, 2))
    def add(self, numbers: list[int], key: tuple[str, str | None], priority: int) -> None:
        added = prefix(numbers, key, priority)
        self.queue.add(added)
        if len(numbers) < FLOOR:
            return
        beside = [other for other in self.model if other.key == key]
        longer = [o for o in beside if len(o.tokens) > len(numbers) and list(o.tokens[: len(numbers)]) == numbers]
        if longer:
            first = self.queue.first()
            assert first in longer
            self.model.remove(first)
            self.model.append(first)
            return
        shorter = [o for o in beside if list(o.tokens) == numbers[: len(o.tokens)]]
        self.model = [other for other in self.model if other not in shorter] + [added]
        while sum(len(other.tokens) for other in self.model) > CAPACITY and len(self.model) > 1:
            self.model.pop(0)
            self.dropped += 1

    @rule(numbers=tokens, key=keys)
    def remove(self, numbers: list[int], key: tuple[str, str | None]) -> None:
        """Whether it waits or not."""
        self.queue.remove(prefix(numbers, key))
        self.model = [other for other in self.model if (list(other.tokens), other.key) != (numbers, key)]

    @rule()
    def remove_the_first(self) -> None:
        if (first := self.queue.first()) is not None:
            self.queue.remove(first)
            self.model.pop()

    @rule()
    def clear(self) -> None:
        self.queue.clear()
        self.model.clear()

    @invariant()
    def as_the_list(self) -> None:
        assert len(self.queue) == len(self.model) and self.queue.dropped == self.dropped
        assert self.queue.first() == (self.model[-1] if self.model else None)

    def teardown(self) -> None:
        """What is left comes in order."""
        while self.model:
            first = self.queue.first()
            assert first == self.model.pop()
            self.queue.remove(first)
        assert self.queue.first() is None


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=200, stateful_step_count=25, deadline=None)


def test_the_latest_is_next() -> None:
    queue = FinishQueue(FLOOR)
    left, right = prefix([1, 2, 3]), prefix([4, 5, 6])
    for used in (left, right, left):
        queue.add(used)
        assert queue.first() == used
    assert len(queue) == 2


def test_a_prefix_takes_the_place_of_all_that_it_continues() -> None:
    queue = FinishQueue(FLOOR)
    for numbers in ([1, 2, 3], [7, 8], [1, 2, 3, 4, 5]):
        queue.add(prefix(numbers))
    assert len(queue) == 2 and queue.first() == prefix([1, 2, 3, 4, 5])


def test_a_shorter_one_brings_the_longer_to_the_front() -> None:
    queue = FinishQueue(FLOOR)
    for numbers in ([1, 2, 3, 4, 5], [7, 8], [1, 2, 3]):
        queue.add(prefix(numbers))
    assert len(queue) == 2 and queue.first() == prefix([1, 2, 3, 4, 5])


@pytest.mark.parametrize("other", KEYS[1:])
def test_prefixes_of_other_keys_are_others(other: tuple[str, str | None]) -> None:
    queue = FinishQueue(FLOOR)
    queue.add(prefix([1, 2, 3]))
    queue.add(prefix([1, 2, 3, 4], other))
    queue.add(prefix([1, 2], other))
    assert len(queue) == 2
    queue.remove(prefix([1, 2, 3, 4], other))
    assert queue.first() == prefix([1, 2, 3])


def test_what_is_short_does_not_wait() -> None:
    queue = FinishQueue()
    queue.add(prefix([1] * (queue.floor - 1)))
    assert len(queue) == 0 and queue.dropped == 0
    queue.add(prefix([1] * queue.floor))
    assert len(queue) == 1


def test_the_least_recently_used_are_dropped_beyond_the_capacity() -> None:
    queue = FinishQueue(FLOOR, capacity=7)
    queue.add(prefix([1, 1, 1]))
    queue.add(prefix([2, 2, 2]))
    queue.add(prefix([1, 1]))  # the first is used again
    queue.add(prefix([3, 3, 3]))
    assert len(queue) == 2 and queue.dropped == 1
    queue.remove(prefix([3, 3, 3]))
    assert queue.first() == prefix([1, 1, 1])


def test_one_longer_than_the_capacity_waits_alone() -> None:
    queue = FinishQueue(FLOOR, capacity=7)
    queue.add(prefix([1, 1, 1]))
    queue.add(prefix([2] * 20))
    assert len(queue) == 1 and queue.dropped == 1 and queue.first() == prefix([2] * 20)
