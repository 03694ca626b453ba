"""What is remembered of finished prefixes, and how often they were in time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.finishing.finished import Finished
from claa_sglang.policy.prefix_uses import BLOCK

prompts = st.builds(
    lambda blocks, rest: [first for first in blocks for _ in range(BLOCK)] + [9] * rest,
    st.lists(st.integers(1, 2), max_size=4),
    st.integers(0, BLOCK - 1),
)


@given(st.lists(prompts, max_size=6), prompts)
def test_the_length_is_that_of_the_longest_common_beginning_in_whole_blocks(
    added: list[list[int]], prompt: list[int]
) -> None:
    finished = Finished()
    for tokens in added:
        finished.add(tokens, "key")
    common = [
        end for end in range(BLOCK, len(prompt) + 1, BLOCK) if any(tokens[:end] == prompt[:end] for tokens in added)
    ]
    assert finished.length(prompt, "key") == max(common, default=0)


def test_a_block_counts_when_all_of_it_is_finished() -> None:
    finished = Finished()
    finished.add([1] * (2 * BLOCK - 1), "")
    assert finished.length([1] * 5 * BLOCK, "") == BLOCK
    finished.add([1] * 2 * BLOCK, "")
    assert finished.length([1] * 5 * BLOCK, "") == 2 * BLOCK


def test_keys_share_nothing() -> None:
    finished = Finished()
    finished.add([1] * BLOCK, "one")
    assert (finished.length([1] * BLOCK, "one"), finished.length([1] * BLOCK, "two")) == (BLOCK, 0)


def test_beyond_the_capacity_the_least_recently_used_are_forgotten() -> None:
    finished = Finished(capacity=4)
    left, right, third = ([first] * 2 * BLOCK for first in (1, 2, 3))
    finished.add(left, "")
    finished.add(right, "")
    assert finished.length(left, "") == 2 * BLOCK  # a use
    finished.add(third, "")
    assert [finished.length(tokens, "") for tokens in (left, right, third)] == [2 * BLOCK, 0, 2 * BLOCK]


def test_a_prefix_whose_beginning_is_forgotten_is_forgotten() -> None:
    finished = Finished(capacity=1)
    finished.add([1] * 2 * BLOCK, "")
    assert finished.length([1] * 2 * BLOCK, "") == 0


@given(st.lists(st.booleans(), max_size=60))
def test_the_share_stays_a_share_and_goes_where_the_last_use_points(uses: list[bool]) -> None:
    finished = Finished()
    assert finished.share == 0, "a server that never has a pause is as one without finishing"
    for in_time in uses:
        before = finished.share
        finished.note(in_time)
        assert 0 <= finished.share < 1 and (finished.share > before) == in_time


@pytest.mark.parametrize("in_time", [True, False])
def test_the_last_ten_uses_or_so_decide(in_time: bool) -> None:
    finished = Finished()
    for _ in range(1000):
        finished.note(not in_time)
    for _ in range(20):
        finished.note(in_time)
    assert (finished.share > 0.8) if in_time else (finished.share < 0.2)


def test_an_emptied_cache_has_no_finished_prefix_but_the_share_stays() -> None:
    finished = Finished()
    finished.add([1] * BLOCK, "")
    finished.note(True)
    share = finished.share
    finished.clear()
    assert finished.length([1] * BLOCK, "") == 0 and finished.share == share > 0.5
