"""Rankers: the default is the server's CLAA bit for bit, every ranker is its plain-loop reference, and their names."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_sglang.kernels.scoring import window_scores
from claa_sglang.ranking import rankers, selection, spec
from claa_sglang.ranking.spec import RankerError, RankerSpec
from tests import naive_rankers
from tests.naive_rankers import Layer

SHAPES = [  # tokens, window, heads, kv_heads, d
    (9, 8, 4, 2, 8),  # one position is ranked
    (11, 8, 6, 3, 5),  # fewer positions than the pool is wide
    (40, 8, 6, 2, 16),
    (23, 1, 4, 4, 8),  # no grouping, a window of one
]
FOLDS = list(itertools.product([True, False], ["max", "sum"], ["before", "after"]))
ALL = ["claa", "last-query", "fastkv", "gemfilter", "uniform"]


def _layers(shape: tuple[int, ...], count: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Layer]:
    tokens, window, heads, kv_heads, dim = shape
    torch.manual_seed(seed)
    # Twice unit scale: attention with peaks, so that a wrong mask or head order shows.
    return [
        Layer((2 * torch.randn(window, heads, dim)).to(dtype), (2 * torch.randn(tokens, kv_heads, dim)).to(dtype))
        for _ in range(count)
    ]


def _ranked(ranker: rankers.Ranker, layers: list[Layer], scaling: float) -> torch.Tensor:
    scores = [ranker.score_layer(layer.q, layer.k, scaling=scaling) for layer in layers]
    positions = layers[0].k.shape[0] - layers[0].q.shape[0]
    assert all(score.dtype == torch.float32 and score.shape[1:] == (positions,) for score in scores)
    got = ranker.rank(scores)
    assert got.dtype == torch.float32 and got.shape == (positions,)
    return got


def _close(got: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool_kernel", [1, 7, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_is_the_servers_ranking_bit_for_bit(shape, pool_kernel: int, dtype: torch.dtype) -> None:
    layers = _layers(shape, dtype=dtype)
    expected = selection.rank([window_scores(q, k, scaling=0.3, pool_kernel=pool_kernel) for q, k in layers])
    assert torch.equal(_ranked(rankers.make(RankerSpec(), pool_kernel=pool_kernel), layers, 0.3), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fold", FOLDS, ids=str)
@pytest.mark.parametrize("name", ["claa", "last-query"])
def test_claa_with_its_switches_equals_naive(shape, fold, name: str) -> None:
    zscore, heads, pool = fold
    layers = _layers(shape)
    spec = RankerSpec(name=name, zscore=zscore, heads=heads, pool=pool, kernel=3)
    queries = 1 if name == "last-query" else shape[1]
    expected = naive_rankers.claa(layers, 0.3, zscore=zscore, heads=heads, pool=pool, kernel=3, queries=queries)
    _close(_ranked(rankers.make(spec), layers, 0.3), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fastkv_and_gemfilter_equal_naive(shape) -> None:
    layers = _layers(shape)
    _close(_ranked(rankers.make(RankerSpec(name="fastkv")), layers, 0.3), naive_rankers.fastkv(layers, 0.3))
    _close(_ranked(rankers.make(RankerSpec(name="gemfilter")), layers, 0.3), naive_rankers.gemfilter(layers, 0.3))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(2, 30),
    window=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    layers=st.integers(1, 3),
    fold=st.sampled_from(FOLDS),
    kernel=st.sampled_from([1, 3, 7]),
)
def test_any_shape_equals_naive(seed, tokens, window, kv_heads, group, layers, fold, kernel) -> None:
    zscore, heads, pool = fold
    shape = (tokens + window, window, kv_heads * group, kv_heads, 4)
    made = _layers(shape, layers, seed)
    spec = RankerSpec(zscore=zscore, heads=heads, pool=pool, kernel=kernel)
    expected = naive_rankers.claa(made, 0.5, zscore=zscore, heads=heads, pool=pool, kernel=kernel, queries=window)
    got = _ranked(rankers.make(spec), made, 0.5)
    # z divides by a spread that may be almost nothing: compare where it is not.
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), rtol=2e-3, atol=2e-3)


def test_switches_and_rankers_change_the_order() -> None:
    """Otherwise the comparisons above would prove little."""
    layers = _layers(SHAPES[2])
    names = [*ALL, "claa:zscore=off", "claa:heads=sum", "claa:pool=after", "claa:kernel=3", "last-query:heads=sum"]
    orders = [tuple(_ranked(rankers.make(spec.parse(n)), layers, 0.3).argsort().tolist()) for n in names]
    assert len(set(orders)) == len(names)


def test_of_one_layer_fastkv_is_claa_with_summed_heads() -> None:
    layers = _layers(SHAPES[2], count=1)
    fastkv = _ranked(rankers.make(RankerSpec(name="fastkv")), layers, 0.3)
    claa = _ranked(rankers.make(RankerSpec(heads="sum")), layers, 0.3)
    assert torch.equal(fastkv.argsort(), claa.argsort())


@pytest.mark.parametrize("name", ["fastkv", "gemfilter"])
def test_one_layer_rankers_read_the_last_layer_only(name: str) -> None:
    layers = _layers(SHAPES[2])
    ranker = rankers.make(RankerSpec(name=name))
    assert torch.equal(_ranked(ranker, layers, 0.3), _ranked(ranker, layers[-1:], 0.3))


def test_gemfilter_pools_before_the_window_is_dropped() -> None:
    # Only the window's own key answers the query; two ranked positions before it are within the pool.
    q, k = torch.ones(1, 1, 1), torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0]).reshape(5, 1, 1)
    assert _ranked(rankers.make(RankerSpec(name="gemfilter")), [Layer(q, k)], 1.0).tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("positions", [1, 3, 200, 5000])
def test_uniform_keeps_the_start_and_samples_the_rest_evenly(positions: int) -> None:
    uniform = rankers.Uniform()
    scores = [uniform.score_layer(torch.zeros(8, 2, 4), torch.zeros(positions + 8, 1, 4), scaling=1.0)]
    got = uniform.rank(scores)
    assert torch.equal(got, uniform.rank(scores)) and got.shape == (positions,)
    kept = selection.select(got, positions + 8, 8 + max(4, positions // 5), 8) if positions >= 4 else torch.arange(11)
    assert set(range(min(4, positions))) <= set(kept.tolist())
    if positions == 5000:  # a fifth of each half, within five standard deviations of a binomial
        share = (kept < 2500).sum() / 2500
        assert abs(share - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 2500)


def test_given_is_what_was_given_and_must_fit() -> None:
    values = torch.arange(5.0).double()
    nothing = [rankers.nothing(torch.zeros(8, 2, 4), torch.zeros(13, 1, 4), scaling=1.0)]
    assert rankers.Given(ranking=values).rank(nothing).tolist() == values.tolist()
    with pytest.raises(ValueError, match="one value for each"):
        rankers.Given(ranking=values[:4]).rank(nothing)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["claa", "claa:zscore=off", "claa:pool=after"])
def test_a_non_finite_head_leaves_the_decision_to_the_others(name: str, bad: float) -> None:
    ranker = rankers.make(spec.parse(f"{name}{',' if ':' in name else ':'}kernel=1"))
    good, broken = torch.tensor([[0.1, 0.4, 0.2]]), torch.tensor([[9.0, bad, 0.0]])
    assert torch.equal(ranker.rank([torch.cat((broken, good))]), ranker.rank([good]))


@given(
    name=st.sampled_from(ALL),
    zscore=st.booleans(),
    heads=st.sampled_from(["max", "sum"]),
    pool=st.sampled_from(["before", "after"]),
    kernel=st.none() | st.integers(0, 511).map(lambda half: 2 * half + 1),
)
def test_a_spec_reads_back_from_its_text(name, zscore, heads, pool, kernel) -> None:
    values = {"zscore": zscore, "heads": heads, "pool": pool, "kernel": kernel}
    made = RankerSpec(name=name, **{switch: values[switch] for switch in spec.SWITCHES[name]})
    assert spec.parse(str(made)) == made


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("clas", "claa, last-query, fastkv, gemfilter, uniform"),
        ("", "no such name"),
        ("CLAA", "no such name"),
        ("claa:zscore", "zscore='' must be on or off"),
        ("claa:zscore=no", "must be on or off"),
        ("claa:", "takes zscore, heads, pool, kernel"),
        ("claa:heads=mean", "must be max or sum"),
        ("claa:pool=before,pool=after", "given twice"),
        ("claa:kernel=4", "odd, 1 to 1023"),
        ("claa:kernel=1025", "odd, 1 to 1023"),
        ("claa:kernel=-3", "odd, 1 to 1023"),
        ("fastkv:heads=max", "fastkv takes kernel"),
        ("uniform:seed=1", "leave out the colon"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_can(text: str, says: str) -> None:
    with pytest.raises(RankerError, match=says):
        spec.parse(text)


def test_the_pool_kernel_of_the_caller_gives_way_to_the_specs() -> None:
    assert rankers.make(spec.parse("fastkv"), pool_kernel=9) == rankers.FastKV(pool_kernel=9)
    assert rankers.make(spec.parse("fastkv:kernel=3"), pool_kernel=9) == rankers.FastKV(pool_kernel=3)
