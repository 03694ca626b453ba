"""Rankers: the paper's rule is the kernels' reference bit for bit, every ranker is its plain loops, and their names."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool1d

from claa_sglang.config.budget import kept_count
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
    (37, 20, 4, 2, 8),  # a window of more than the paper's 8 queries
]
FOLDS = list(itertools.product([True, False], ["max", "sum"], ["before", "after"]))
ALL = list(spec.SWITCHES)


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
def test_the_papers_rule_is_window_scores_and_rank_bit_for_bit(shape, pool_kernel: int, dtype: torch.dtype) -> None:
    layers = _layers(shape, dtype=dtype)
    positions = shape[0] - shape[1]
    if shape[1] <= 8:
        scores = [window_scores(q, k, scaling=0.3, pool_kernel=pool_kernel) for q, k in layers]
    else:  # of a longer window the last 8; its other tokens are dropped before anything is pooled
        mass = [window_scores(q[-8:], k, scaling=0.3, pool_kernel=1)[:, :positions] for q, k in layers]
        scores = [avg_pool1d(row, pool_kernel, stride=1, padding=pool_kernel // 2) for row in mass]
    got = _ranked(rankers.make(spec.parse("claa:paper"), pool_kernel=pool_kernel), layers, 0.3)
    assert torch.equal(got, selection.rank(scores))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fold", FOLDS, ids=str)
@pytest.mark.parametrize("name", naive_rankers.CLAA_SWITCHES)
def test_claa_with_its_switches_equals_naive(shape, fold, name: str) -> None:
    zscore, heads, pool = fold
    layers = _layers(shape)
    ranker = rankers.make(replace(spec.parse(name), zscore=zscore, heads=heads, pool=pool, kernel=3))
    switches = naive_rankers.CLAA_SWITCHES[name]
    expected = naive_rankers.claa(layers, 0.3, zscore=zscore, heads=heads, pool=pool, kernel=3, **switches)
    _close(_ranked(ranker, layers, 0.3), expected)


@pytest.mark.parametrize("name", ALL)
def test_a_name_that_the_flag_takes_is_a_ranker_with_these_switches(name: str) -> None:
    kind = rankers.KINDS[name]
    assert type(rankers.make(spec.parse(name))) is kind
    assert [field.name.removeprefix("pool_") for field in fields(kind)] == list(spec.SWITCHES[name])


def test_every_ranker_can_be_named_and_has_an_oracle() -> None:
    assert list(rankers.KINDS) == ALL
    assert {*(name.partition(":")[0] for name in naive_rankers.ORACLES), "uniform"} == set(ALL)
    with pytest.raises(KeyError):
        rankers.make(RankerSpec(name="snapkv"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", naive_rankers.ORACLES)
def test_every_ranker_equals_naive(shape, name: str) -> None:
    layers = _layers(shape)
    expected = naive_rankers.ORACLES[name](layers, 0.3)
    _close(_ranked(rankers.make(spec.parse(name)), layers, 0.3), expected)


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
    name=st.sampled_from(list(naive_rankers.CLAA_SWITCHES)),
)
def test_any_shape_equals_naive(seed, tokens, window, kv_heads, group, layers, fold, kernel, name) -> None:
    zscore, heads, pool = fold
    shape = (tokens + window, window, kv_heads * group, kv_heads, 4)
    made = _layers(shape, layers, seed)
    ranker = rankers.make(replace(spec.parse(name), zscore=zscore, heads=heads, pool=pool, kernel=kernel))
    switches = {"zscore": zscore, "heads": heads, "pool": pool, "kernel": kernel, **naive_rankers.CLAA_SWITCHES[name]}
    scores = [ranker.score_layer(layer.q, layer.k, scaling=0.5) for layer in made]
    joined = switches.pop("last", False)
    looks = [dict(switches, loss=0.0)] + ([dict(switches, loss=0.0, queries=1, peaks=False)] if joined else [])
    folded = [ranker.fold([layer.chunk(len(looks))[i] for layer in scores]) for i in range(len(looks))]
    for of_look, look in zip(folded, looks, strict=True):
        expected = torch.tensor(naive_rankers.claa(made, 0.5, **look), dtype=torch.float32)
        # z divides by a spread that may be almost nothing: compare where it is not.
        torch.testing.assert_close(of_look, expected, rtol=2e-3, atol=2e-3)
    # Places hang on ranks, which rounding may swap: of the same fold.
    loss, (first, *others) = switches["loss"], [of_look.tolist() for of_look in folded]
    if joined:
        pairs = zip(
            naive_rankers.carried(first, loss or math.inf), naive_rankers.carried(others[0], math.inf), strict=True
        )
        _close(_ranked(ranker, made, 0.5), [max(pair) for pair in pairs])
    else:
        _close(_ranked(ranker, made, 0.5), naive_rankers.carried(first, loss) if loss else first)


def test_switches_and_rankers_change_the_order() -> None:
    """Otherwise the comparisons above would prove little."""
    layers = _layers(SHAPES[2])
    names = [*ALL, "claa:zscore=off", "claa:heads=sum", "claa:pool=after", "claa:kernel=3", "last-query:heads=sum"]
    names += ["claa:paper", "claa:queries=sum", "claa:last=off", "claa:carry=0", "claa:carry=0.2", "last-query:carry=0"]
    orders = [tuple(_ranked(rankers.make(spec.parse(n)), layers, 0.3).argsort().tolist()) for n in names]
    assert len(set(orders)) == len(names)


def test_of_one_layer_fastkv_is_claa_with_summed_heads() -> None:
    layers = _layers(SHAPES[2], count=1)
    fastkv = _ranked(rankers.make(RankerSpec(name="fastkv")), layers, 0.3)
    claa = _ranked(rankers.make(spec.parse("claa:paper,heads=sum")), layers, 0.3)
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
@pytest.mark.parametrize("name", ["claa", "claa:last=off", "claa:paper", "claa:zscore=off", "claa:pool=after"])
def test_a_non_finite_head_leaves_the_decision_to_the_others(name: str, bad: float) -> None:
    ranker = rankers.make(spec.parse(f"{name}{',' if ':' in name else ':'}kernel=1"))
    good, broken = torch.tensor([[0.1, 0.4, 0.2]]), torch.tensor([[9.0, bad, 0.0]])
    looks = 2 if ranker.statistic == "peak_and_last" else 1
    whole, others = torch.cat((broken, good)).repeat(looks, 1), good.repeat(looks, 1)
    assert torch.equal(ranker.rank([whole]), ranker.rank([others]))


@pytest.mark.parametrize("name", [*ALL, "claa:paper", "claa:carry=0"])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_first_token_is_kept_by_every_ranker_at_every_rate(name: str, rate: float) -> None:
    q, k = _layers((300, 32, 4, 2, 8), count=1)[0]
    k[0] = -4 * q[-32:, ::2].mean(dim=0)  # what every query looks away from
    ranking = _ranked(rankers.make(spec.parse(name)), [Layer(q, k)], 0.3)
    if name != "uniform":
        assert selection.by_rank(ranking)[0] != 0
    for ranked in (ranking, -ranking, torch.full_like(ranking, math.nan)):
        kept = kept_count(300, rate, 32)
        positions = selection.select(ranked, 300, kept, 32).tolist()
        # At the lowest rates only the window has room.
        assert (positions[0] == 0) == (kept > 32) and len(positions) == kept


@given(
    name=st.sampled_from(ALL),
    zscore=st.booleans(),
    heads=st.sampled_from(["max", "sum"]),
    pool=st.sampled_from(["before", "after"]),
    kernel=st.none() | st.integers(0, 511).map(lambda half: 2 * half + 1),
    carry=st.sampled_from([0.0, 0.02, 1e-9, 10.0]) | st.integers(0, 10**10).map(lambda parts: parts / 10**9),
    queries_and_last=st.sampled_from([("max", True), ("max", False), ("sum", True)]),  # with a sum it is not written
)
def test_a_spec_reads_back_from_its_text(name, zscore, heads, pool, kernel, carry, queries_and_last) -> None:
    queries, last = queries_and_last
    values = {"zscore": zscore, "heads": heads, "pool": pool, "kernel": kernel, "carry": carry}
    values |= {"queries": queries, "last": last}
    made = RankerSpec(name=name, **{switch: values[switch] for switch in spec.SWITCHES[name]})
    assert spec.parse(str(made)) == made


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("claa:queries=max,carry=0.020", "claa"),
        ("claa:carry=0,queries=sum", "claa:paper"),
        ("claa:kernel=3,paper", "claa:paper,kernel=3"),
        ("claa:queries=sum", "claa:queries=sum"),
        ("claa:carry=0", "claa:carry=0"),
        ("claa:carry=10.000", "claa:carry=10"),
        ("claa:carry=0,last=off,queries=max", "claa:last=off,carry=0"),
        ("claa:last=on", "claa"),
        ("last-query:carry=000.05", "last-query:carry=0.05"),
    ],
)
def test_a_spec_is_written_in_the_shortest_way(text: str, shortest: str) -> None:
    assert str(spec.parse(text)) == shortest
    assert spec.parse(shortest) == spec.parse(text)


def test_the_papers_rule_is_two_switches_of_claa() -> None:
    assert spec.parse("claa:paper") == RankerSpec(queries="sum", carry=0.0)
    assert rankers.make(spec.parse("claa:paper")) == rankers.Claa(queries="sum", carry=0.0)


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
        ("claa:carry=-0.1", "carry='-0.1' must be a number from 0 to 10"),
        ("claa:carry=10.1", "carry='10.1' must be a number from 0 to 10"),
        ("claa:carry=nan", "from 0 to 10"),
        ("claa:carry=1e-3", "from 0 to 10"),
        ("claa:carry=", "from 0 to 10"),
        ("claa:carry=\u0665", "from 0 to 10"),  # a digit, but not of ASCII
        ("claa:carry=0.0000000001", "from 0 to 10"),  # more places than are written again
        ("claa:queries=mean", "queries='mean' must be max or sum"),
        ("claa:paper,carry=0", "carry is given twice"),
        ("claa:queries=max,paper", "queries is given twice"),
        ("claa:paper=on", "no switch 'paper'"),
        ("claa:queries=sum,last=off", "last is a switch of queries=max"),
        ("claa:paper,last=on", "last is a switch of queries=max"),
        ("last-query:paper", "no switch 'paper'"),
        ("last-query:queries=sum", "last-query takes zscore, heads, pool, kernel, carry"),
        ("fastkv:carry=0", "fastkv takes kernel"),
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
