"""A pruned answer held against the dense model's log probabilities, beside a table of all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.shadow.agreement import Agreement, agreement
from claa_sglang.shadow.counts import Counts

VOCABULARY = 5
# Few values, so that ties are common.
ROWS = st.lists(
    st.lists(st.sampled_from([-0.25, -0.5, -1.0, -3.0]), min_size=VOCABULARY, max_size=VOCABULARY), min_size=1
)


def lists(answer: list[int], rows: list[list[float]], last: bool = False) -> tuple[list[Any], list[Any]]:
    """What SGLang returns of these rows of log probabilities; of equally likely tokens the first one, or the last."""
    own = [(row[token], token, None) for token, row in zip(answer, rows, strict=True)]
    chosen = [max(range(VOCABULARY), key=lambda token: (row[token], token if last else -token)) for row in rows]
    return own, [[(row[token], token, None)] for token, row in zip(chosen, rows, strict=True)]


@given(ROWS, st.data())
def test_it_is_what_the_whole_rows_say(rows: list[list[float]], data: st.DataObject) -> None:
    answer = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=len(rows), max_size=len(rows)))
    likeliest = [row[token] == max(row) for token, row in zip(answer, rows, strict=True)]
    expected = Agreement(
        len(answer),
        likeliest.count(True),
        next((n for n, agrees in enumerate(likeliest) if not agrees), len(answer)),
        sum(row[token] for token, row in zip(answer, rows, strict=True)),
    )
    for last in (False, True):
        found = agreement(answer, *lists(answer, rows, last))
        assert found[:3] == expected[:3] and found.logprob == pytest.approx(expected.logprob)
        assert found.same == all(likeliest)


@given(ROWS)
def test_the_dense_answer_agrees_with_itself(rows: list[list[float]]) -> None:
    for last in (False, True):
        _, top = lists([0] * len(rows), rows, last)
        answer = [best[0][1] for best in top]
        assert agreement(answer, *lists(answer, rows)).same


@pytest.mark.parametrize(
    ("own", "top"),
    [
        ([], []),
        ([(-1.0, 3, None)], [[(-1.0, 3, None)]]),
        ([(-1.0, 3, None)] * 2, [[(-1.0, 3, None)]]),
        ([(-1.0, 3, None), (-1.0, 5, None)], [[(-1.0, 3, None)]] * 2),
        ([(-1.0, 3, None), (math.nan, 4, None)], [[(-1.0, 3, None)]] * 2),
        ([(-1.0, 3, None), (-1.0, 4, None)], [[(-1.0, 3, None)], []]),
        ([(-1.0, 3, None), (-1.0, 4, None)], [[(-1.0, 3, None)], None]),
    ],
)
def test_lists_of_something_else_are_an_error(own: list[Any], top: list[Any]) -> None:
    with pytest.raises(ValueError, match="log probabilit"):
        agreement([3, 4], own, top)


def test_the_last_token_of_the_vocabulary_may_be_written_as_0() -> None:
    top = [[(-0.5, 511, None)], [(-1.0, 3, None)]]
    assert agreement([511, 3], [(-0.5, 0, None), (-1.0, 3, None)], top).same
    assert not agreement([511, 3], [(-0.6, 0, None), (-1.0, 3, None)], [[(-0.5, 7, None)], top[1]]).same


def test_counts_are_sums_and_means() -> None:
    counts = Counts()
    assert counts.stats()["greedy"]["agreement"] is None and counts.stats()["greedy"]["mean_logprob"] is None
    counts.count("greedy", "same", Agreement(4, 4, 4, -2.0))
    counts.count("greedy", "different", Agreement(6, 3, 1, -10.0))
    counts.count("greedy", "dropped", None)
    counts.count("sampled", "failed", None)
    greedy = {"same": 1, "different": 1, "dropped": 1, "failed": 0, "tokens": 10, "agreeing": 7}
    assert counts.stats()["greedy"] == {**greedy, "before_difference": 5, "agreement": 0.7, "mean_logprob": -1.2}
    assert counts.stats()["sampled"]["failed"] == 1 and counts.stats()["sampled"]["tokens"] == 0
