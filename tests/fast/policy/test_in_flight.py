"""Prefills under way, as what the prefix cache will have."""

from __future__ import annotations

from array import array

import pytest

from claa_sglang.policy.in_flight import InFlight, Prefill

PROMPT = array("q", [*range(100, 150)])


def prefill(tokens: array, key: str = "a", alive: bool = True, ends: bool = True) -> Prefill:
    return Prefill(tokens, key, lambda: alive, lambda: ends)


@pytest.mark.parametrize(("length", "limit", "expected"), [(50, 49, 49), (50, 100, 50), (20, 49, 20), (0, 49, 0)])
def test_the_beginning_that_is_shared(length: int, limit: int, expected: int) -> None:
    flights = InFlight()
    flights.add(prefill(PROMPT[:length] + array("q", [7] * 9)))
    assert flights.shared(PROMPT, "a", limit) == (expected, expected > 0)
    assert flights.shared(PROMPT, "b", limit) == (0, False)


@pytest.mark.parametrize("turned", [False, True])
def test_the_longest_counts_and_of_equal_ones_the_one_that_ends(turned: bool) -> None:
    flights = InFlight()
    several = [prefill(PROMPT, ends=False), prefill(PROMPT, ends=True), prefill(PROMPT[:30], ends=True)]
    for one in several[::-1] if turned else several:
        flights.add(one)
    assert flights.shared(PROMPT, "a", 49) == (49, True)


def test_who_ended_is_forgotten_with_the_next_step() -> None:
    """Of the step that is being made, nobody has a row yet."""
    flights = InFlight()
    flights.add(prefill(PROMPT, alive=False))
    assert flights.shared(PROMPT, "a", 49) == (49, True)
    flights.begin_step()
    assert flights.shared(PROMPT, "a", 49) == (0, False)
