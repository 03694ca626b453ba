"""Pooling, z-score and max fold in Triton against plain loops, in Triton's interpreter (how, and that it leaves no
trace: tests/interpreter.py and test_triton_interpreter.py). On a real GPU: tests/gpu/test_kernels_gpu.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from claa_sglang.kernels import naive
from claa_sglang.kernels.layout import describe
from claa_sglang.ranking import selection as torch_ranking
from tests import interpreter

WINDOW = 8


@pytest.fixture(scope="module")
def kernel() -> Any:
    return interpreter.load("fold")


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[Any]:
    """The kernel with 32 positions a block and 2 blocks read together, so that short rows have many."""
    small = interpreter.load("fold")
    small.module._BLOCK, small.module._MOMENTS = 32, 2
    yield small


def requests_of(ranked: Sequence[int]) -> Tensor:
    nobody = [0] * len(ranked)
    return torch.tensor(describe(nobody, nobody, [n + WINDOW for n in ranked], WINDOW), dtype=torch.int32)


def run(kernel: Any, layers: Sequence[Tensor], ranked: Sequence[int], pool: int) -> Tensor:
    """Fold layers `[kv_heads * sum(ranked)]` into one ranking, which starts as garbage."""
    ranking = torch.full((sum(ranked),), math.inf)
    for i, mass in enumerate(layers):
        kernel.fold(
            mass,
            requests_of(ranked),
            ranking,
            window=WINDOW,
            pool_kernel=pool,
            max_tokens=max(ranked) + WINDOW,
            first_layer=i == 0,
        )
    return ranking


def expected(layers: Sequence[Tensor], ranked: Sequence[int], pool: int) -> Tensor:
    ranking = torch.full((sum(ranked),), math.nan)
    for i, mass in enumerate(layers):
        naive.fold(mass, requests_of(ranked), ranking, window=WINDOW, pool_kernel=pool, first_layer=i == 0)
    return ranking


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    ranked=st.lists(st.integers(1, 130), min_size=1, max_size=2),
    heads=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    pool=st.sampled_from([1, 3, 7, 31]),
)
def test_ranking_equals_naive(small_blocks: Any, seed: int, ranked: list[int], heads: list[int], pool: int) -> None:
    # Where the pool covers everything, all scores are equal and z is rounding noise over 1e-8.
    assume(all(count == 1 or count > pool for count in ranked))
    torch.manual_seed(seed)
    layers = [torch.rand(count * sum(ranked)) ** 4 for count in heads]
    got = run(small_blocks, layers, ranked, pool)
    torch.testing.assert_close(got, expected(layers, ranked, pool), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranked", [(1024,), (1025, 1023), (3000,)], ids=lambda r: "+".join(map(str, r)))
def test_blocks_as_they_are_launched(kernel: Any, ranked: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = [torch.rand(2 * sum(ranked)) ** 4]
    torch.testing.assert_close(run(kernel, layers, ranked, 7), expected(layers, ranked, 7), rtol=1e-4, atol=1e-4)


def test_tiny_scores_on_a_large_mean(small_blocks: Any) -> None:
    # The spread is in the last bits: the difference of squares would lose it all. So does a sum over the whole row.
    torch.manual_seed(0)
    mass = 3e-5 + 2e-9 * torch.randn(1, 400)
    mass[0, 200] = 3.2e-5
    got, want = run(small_blocks, [mass.flatten()], [400], 1), expected([mass.flatten()], [400], 1)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_padding_counts_as_zeros(kernel: Any) -> None:
    # Pool of 3 over [3, 3, 3]: [2, 3, 2]; mean 7/3, unbiased std 1/sqrt(3).
    z = run(kernel, [torch.full((3,), 3.0)], [3], 3)
    torch.testing.assert_close(z, torch.tensor([-1.0, 2.0, -1.0]) / 3**0.5)


def test_epsilon_is_added_to_the_std(kernel: Any) -> None:
    z = run(kernel, [torch.tensor([0.0, 2e-8])], [2], 1)
    torch.testing.assert_close(z[1].item(), 1e-8 / (2**0.5 * 1e-8 + 1e-8), rtol=1e-4, atol=0)


def test_one_position_scores_zero(kernel: Any) -> None:
    assert run(kernel, [torch.tensor([0.7, 0.1, math.nan, 0.3])], [1, 1], 7).tolist() == [0.0, 0.0]
    assert run(kernel, [torch.tensor([math.nan])], [1], 1).tolist() == [-math.inf]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_row_leaves_the_decision_to_the_others(small_blocks: Any, bad: float) -> None:
    torch.manual_seed(0)
    rows = torch.rand(2, 50)
    alone = run(small_blocks, [rows[1]], [50], 3)
    rows[0, 40] = bad  # in another block than the first positions
    assert torch.equal(run(small_blocks, [rows.flatten()], [50], 3), alone)
    assert run(small_blocks, [rows[0]], [50], 3).tolist() == [-math.inf] * 50
    assert torch.equal(run(small_blocks, [rows[0], rows[1]], [50], 3), alone)


def test_a_row_whose_squares_overflow_leaves_the_decision_to_the_others(small_blocks: Any) -> None:
    # Its std is infinite and every z 0, above the negative ones of the other row.
    rows = torch.rand(2, 50)
    alone = run(small_blocks, [rows[1]], [50], 1)
    rows[0, 40] = 1e25
    assert torch.equal(run(small_blocks, [rows.flatten()], [50], 1), alone)


def test_agrees_with_the_torch_ranking(small_blocks: Any) -> None:
    torch.manual_seed(0)
    rows = torch.rand(3, 70) ** 6
    got = run(small_blocks, [rows.flatten()], [70], 1)
    torch.testing.assert_close(got, torch_ranking.rank([rows]), rtol=1e-4, atol=1e-5)


def test_a_request_does_not_depend_on_its_neighbours(small_blocks: Any) -> None:
    torch.manual_seed(0)
    mine, other = torch.rand(2 * 40), torch.rand(2 * 100)
    together = run(small_blocks, [torch.cat((mine, other))], [40, 100], 7)
    assert torch.equal(together[:40], run(small_blocks, [mine], [40], 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_kernel": 4}, "odd pool_kernel"),
        ({"pool_kernel": 0}, "odd pool_kernel"),
        ({"mass": torch.zeros(21)}, "whole rows"),
        ({"mass": torch.zeros(5)}, "whole rows"),
        ({"mass": torch.zeros(20, dtype=torch.float16)}, "float16"),
        ({"mass": torch.zeros(40)[::2]}, "contiguous"),
        ({"requests": torch.zeros(3, 1, dtype=torch.int32)}, r"\(3, 1\)"),
        ({"max_tokens": WINDOW}, "longest prompt 8"),
    ],
    ids=lambda value: "=".join(map(str, *value.items())) if isinstance(value, dict) and "mass" not in value else None,
)
def test_what_does_not_fit_is_refused(kernel: Any, change: dict, message: str) -> None:
    arguments = {"mass": torch.zeros(20), "requests": requests_of([10]), "ranking": torch.zeros(10)}
    arguments |= {"window": WINDOW, "pool_kernel": 7, "max_tokens": 18, "first_layer": True}
    with pytest.raises(ValueError, match=f"fold: .*{message}"):
        kernel.fold(**(arguments | change))
