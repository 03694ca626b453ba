"""What a token carries to those after it: answers by hand, the plain-loop reference, and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from claa_sglang.kernels import naive
from claa_sglang.ranking.carry import carry
from claa_sglang.ranking.selection import by_rank, select
from tests import naive_rankers

BOTH = pytest.mark.parametrize("function", [carry, naive.carry], ids=["fast", "naive"])
# Few distinct values, so that ties are the rule; and the values that break a careless sort.
VALUES = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, math.inf, -math.inf, math.nan]) | st.floats(width=32)
RANKINGS = st.lists(VALUES, min_size=1, max_size=60).map(lambda values: torch.tensor(values, dtype=torch.float32))
LOSSES = st.sampled_from([0.0, 1e-9, 0.02, 0.5, 10.0])
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@BOTH
def test_by_hand(function) -> None:
    # Of 4 tokens ln 4, ln 2, ln 4/3 and 0 by rank. The best is second and carries 0.5 less a token.
    got = function(torch.tensor([1.0, 9.0, 0.0, 3.0]), 0.5)
    best = math.log(4)
    torch.testing.assert_close(got, torch.tensor([math.log(4 / 3), best, best - 0.5, max(best - 1.0, math.log(2))]))


@BOTH
def test_nothing_is_carried_backwards(function) -> None:
    got = function(torch.tensor([0.0, 1.0, 2.0, 9.0]), 0.001)
    torch.testing.assert_close(got, torch.tensor([0.0, math.log(4 / 3), math.log(2), math.log(4)]))


@BOTH
def test_one_token_has_nothing_to_rank_against(function) -> None:
    for value in (0.0, 7.0, math.nan, -math.inf):
        assert function(torch.tensor([value]), 0.02).tolist() == [0.0]


@BOTH
@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.5, math.inf])
def test_of_equals_the_first_is_best(function, value: float) -> None:
    got = function(torch.full((5,), value), 0.02)
    # Each step down the ranks costs ln(2), ln(3/2) and so on, all more than 0.02: the first carries all others.
    torch.testing.assert_close(got, math.log(5) - 0.02 * torch.arange(5))


@settings(deadline=None)
@given(ranking=RANKINGS, loss=LOSSES)
@example(ranking=torch.tensor([-0.0, 0.0, -0.0]), loss=0.02)
def test_equals_naive(ranking: torch.Tensor, loss: float) -> None:
    got = carry(ranking, loss)
    assert got.dtype == torch.float32 and got.shape == ranking.shape and not got.isnan().any()
    torch.testing.assert_close(got, naive.carry(ranking, loss), **CLOSE)


@settings(deadline=None)
@given(ranking=RANKINGS, loss=LOSSES)
def test_its_promises(ranking: torch.Tensor, loss: float) -> None:
    got, order = carry(ranking, loss), by_rank(ranking)
    count = len(ranking)
    own = torch.empty(count)
    own[order] = (count / torch.arange(1, count + 1).double()).log().float()
    # Nothing falls below its own strength, nothing rises above the best, and a step costs at most the loss.
    assert (got >= own - 1e-6).all() and (got <= got[order[0]]).all()
    assert (got[1:] >= got[:-1] - loss - 2e-6).all()
    # The best token stays best, and everything before it is as it was before that token came.
    assert by_rank(got)[0] == order[0]
    torch.testing.assert_close(got[order[0]].item(), math.log(count), **CLOSE)


@settings(deadline=None)
@given(ranking=RANKINGS, loss=LOSSES)
def test_only_the_order_matters(ranking: torch.Tensor, loss: float) -> None:
    places = torch.empty(len(ranking))
    places[by_rank(ranking)] = -torch.arange(len(ranking), dtype=torch.float32)
    assert torch.equal(carry(places, loss), carry(ranking, loss))
    # Another increasing function of the same places.
    assert torch.equal(carry(places.exp() if len(ranking) < 60 else 3 * places - 1, loss), carry(ranking, loss))


@settings(deadline=None)
@given(ranking=RANKINGS, low=LOSSES, high=LOSSES)
def test_a_higher_loss_carries_less(ranking: torch.Tensor, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert (carry(ranking, low) >= carry(ranking, high) - 1e-6).all()


@settings(deadline=None)
@given(ranking=RANKINGS)
def test_without_loss_everything_after_the_best_is_as_good(ranking: torch.Tensor) -> None:
    got, best = carry(ranking, 0.0), int(by_rank(ranking)[0])
    assert (got[best:] == got[best]).all()
    assert (got[:best] < got[best]).all()
    assert (got.diff() >= 0).all()


def test_a_span_is_kept_whole() -> None:
    """The end of a prompt looks at the first token of what it copies: 40 tokens of 1,000 come with it."""
    ranking = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    ranking[600] = 5.0
    assert set(range(600, 640)) <= set(select(carry(ranking, 0.02), 1008, 208, 8).tolist())
    assert not set(range(600, 640)) <= set(select(ranking, 1008, 208, 8).tolist())


@pytest.mark.parametrize("loss", [0.02, 1.0])
def test_a_long_prompt_keeps_the_digits_of_fp64(loss: float) -> None:
    # At the end the loss has summed up to 2,000 (or 100,000), of which fp32 has 4 (or 2) decimals.
    count = 100_000
    ranking = torch.rand(count, generator=torch.Generator().manual_seed(1))
    got = carry(ranking, loss)
    expected = torch.tensor(naive_rankers.carried(ranking.tolist(), loss)).float()
    torch.testing.assert_close(got, expected, rtol=2e-7, atol=2e-7)
    for kept in (1_000, 20_000, 60_000):
        assert torch.equal(select(got, count + 8, kept, 8), select(expected, count + 8, kept, 8))
