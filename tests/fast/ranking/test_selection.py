"""z-score, max fold and selection: known answers, the plain-loop reference, and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from claa_sglang.config.budget import kept_count
from claa_sglang.kernels import naive
from claa_sglang.ranking import selection

BOTH = pytest.mark.parametrize("module", [selection, naive], ids=["fast", "naive"])
# Few distinct values, so that ties are the rule; and the values that break a careless sort.
VALUES = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, math.inf, -math.inf, math.nan])


@BOTH
def test_std_is_unbiased(module) -> None:
    # mean 0.5, unbiased std sqrt(0.5); the biased one would give 1 and -1
    z = module.rank([torch.tensor([[0.0, 1.0]])])
    torch.testing.assert_close(z, torch.tensor([-(0.5**0.5), 0.5**0.5]))


@BOTH
def test_epsilon_is_added_to_the_std(module) -> None:
    std = 2**0.5 * 1e-8
    z = module.rank([torch.tensor([[0.0, 2e-8]])])
    torch.testing.assert_close(z[1].item(), 1e-8 / (std + 1e-8), rtol=1e-4, atol=0)


@BOTH
def test_fold_is_the_maximum_over_heads_and_layers(module) -> None:
    up, down = [0.0, 0.0, 3.0], [3.0, 0.0, 0.0]
    high, low = 2 / 3**0.5, -1 / 3**0.5
    expected = torch.tensor([high, low, high])
    torch.testing.assert_close(module.rank([torch.tensor([up, down])]), expected)
    torch.testing.assert_close(module.rank([torch.tensor([up]), torch.tensor([down])]), expected)


@BOTH
def test_scale_of_a_row_does_not_matter(module) -> None:
    row = torch.tensor([[0.1, 0.4, 0.2, 0.9]])
    torch.testing.assert_close(module.rank([row * 100]), module.rank([row]))


@BOTH
def test_one_position_scores_zero(module) -> None:
    assert module.rank([torch.tensor([[0.7], [0.1]])]).tolist() == [0.0]
    assert module.rank([torch.tensor([[math.nan]])]).tolist() == [-math.inf]


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_row_leaves_the_decision_to_the_others(module, bad: float) -> None:
    good = torch.tensor([[0.1, 0.4, 0.2]])
    broken = torch.tensor([[9.0, bad, 0.0]])
    assert torch.equal(module.rank([torch.cat((broken, good))]), module.rank([good]))
    assert module.rank([broken]).tolist() == [-math.inf] * 3


def test_rank_refuses_what_it_cannot_rank() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        selection.rank([])
    with pytest.raises(ValueError, match="fp32"):
        selection.rank([torch.zeros(2, 5, dtype=torch.float16)])
    with pytest.raises(ValueError, match="kv_heads"):
        selection.rank([torch.zeros(5)])


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    heads=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    positions=st.integers(1, 60),
)
def test_rank_equals_naive(seed: int, heads: list[int], positions: int) -> None:
    torch.manual_seed(seed)
    scores = [torch.rand(count, positions) ** 4 for count in heads]
    got = selection.rank(scores)
    assert got.dtype == torch.float32 and got.shape == (positions,)
    torch.testing.assert_close(got, naive.rank(scores), rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(values=st.lists(VALUES, max_size=40), window=st.integers(1, 12), rate=st.floats(0.01, 1.0))
@example(values=[], window=8, rate=0.2)
@example(values=[-0.0, 0.0, -0.0, 0.0], window=1, rate=0.5)
def test_select_equals_naive_and_keeps_its_promises(values: list[float], window: int, rate: float) -> None:
    ranks = torch.tensor(values, dtype=torch.float32)
    tokens = len(values) + window
    kept = kept_count(tokens, rate, window)
    got = selection.select(ranks, tokens, kept, window)
    assert torch.equal(got, naive.select(ranks, tokens, kept, window))
    assert got.dtype == torch.int64
    positions = got.tolist()
    assert len(positions) == kept
    assert positions == sorted(set(positions)) and positions[-1] == tokens - 1 and positions[0] >= 0
    assert set(range(tokens - window, tokens)) <= set(positions)
    # The first token is kept whatever its rank, if there is room beside the window.
    assert (positions[0] == 0) == (kept > window or not values)
    # Of the others, nothing left out outranks anything chosen; of equals, the earlier is chosen.
    key = [(-math.inf if math.isnan(value) else value, -position) for position, value in enumerate(values)]
    chosen = [key[position] for position in positions if 0 < position < len(values)]
    left = [key[position] for position in range(1, len(values)) if position not in set(positions)]
    assert not chosen or not left or min(chosen) > max(left)


@BOTH
def test_the_first_token_is_one_of_the_kept(module) -> None:
    ranks = torch.tensor([-math.inf, 3.0, 1.0, 2.0])
    assert module.select(ranks, 6, 2, 2).tolist() == [4, 5]  # the window alone
    assert module.select(ranks, 6, 3, 2).tolist() == [0, 4, 5]
    assert module.select(ranks, 6, 4, 2).tolist() == [0, 1, 4, 5]
    assert module.select(ranks, 6, 5, 2).tolist() == [0, 1, 3, 4, 5]


@BOTH
@pytest.mark.parametrize("tokens", [1, 7, 8])
def test_short_prompts_keep_everything(module, tokens: int) -> None:
    kept = kept_count(tokens, 0.2, 8)
    assert module.select(torch.empty(0), tokens, kept, 8).tolist() == list(range(tokens))


@settings(deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=40), low=st.floats(0.01, 1), high=st.floats(0.01, 1))
def test_a_lower_rate_keeps_a_subset(values: list[float], low: float, high: float) -> None:
    ranks, tokens = torch.tensor(values, dtype=torch.float32), len(values) + 4
    counts = [kept_count(tokens, rate, 4) for rate in sorted((low, high))]
    few, many = (set(selection.select(ranks, tokens, kept, 4).tolist()) for kept in counts)
    assert few <= many


def test_select_refuses_lengths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="kept 7"):
        selection.select(torch.zeros(12), 20, 7, 8)  # below the window
    with pytest.raises(ValueError, match="kept 21"):
        selection.select(torch.zeros(12), 20, 21, 8)
    with pytest.raises(ValueError, match=r"ranking \[12\]"):
        selection.select(torch.zeros(13), 20, 10, 8)
