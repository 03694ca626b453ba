"""Window scores and peaks: answers by hand, the plain-loop reference on awkward shapes, memory and refusals."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from claa_sglang.kernels import naive, scoring

BOTH = pytest.mark.parametrize("module", [scoring, naive], ids=["fast", "naive"])


class Case(NamedTuple):
    tokens: int
    window: int
    heads: int
    kv_heads: int
    dim: int
    pool: int

    def __str__(self) -> str:
        return "-".join(f"{name[0].upper()}{value}" for name, value in self._asdict().items())


CASES = [
    Case(tokens=9, window=8, heads=4, kv_heads=2, dim=8, pool=7),  # one position is ranked
    Case(tokens=2, window=1, heads=1, kv_heads=1, dim=1, pool=1),
    Case(tokens=11, window=8, heads=9, kv_heads=3, dim=16, pool=7),  # fewer positions than the pool is wide
    Case(tokens=63, window=8, heads=6, kv_heads=6, dim=5, pool=7),  # no grouping
    Case(tokens=80, window=5, heads=8, kv_heads=1, dim=64, pool=1),  # one KV head, no pooling
    Case(tokens=257, window=16, heads=9, kv_heads=3, dim=64, pool=13),
    Case(tokens=65, window=64, heads=2, kv_heads=1, dim=4, pool=3),
]
SHAPES = pytest.mark.parametrize("case", CASES, ids=str)


def _inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(case.tokens)
    # Twice unit scale: attention with peaks, so that a wrong mask or head order shows.
    q = 2 * torch.randn(case.window, case.heads, case.dim)
    k = 2 * torch.randn(case.tokens, case.kv_heads, case.dim)
    return q.to(dtype), k.to(dtype)


@BOTH
def test_uniform_attention_by_hand(module) -> None:
    # Zero queries: a window query that sees n keys gives each 1/n. N = 6, W = 2: the rows see 5 and 6 keys.
    # Two query heads per KV head double it, and a pool of 3 has a zero beyond either end.
    got = module.window_scores(torch.zeros(2, 4, 8), torch.randn(6, 2, 8), scaling=1.0, pool_kernel=3)
    inner = 2 * (1 / 5 + 1 / 6)
    edge = inner * 2 / 3
    torch.testing.assert_close(got, torch.tensor([[edge, inner, inner, edge]] * 2))


@BOTH
def test_query_heads_read_their_own_kv_head(module) -> None:
    # Query heads 0 and 1 belong to KV head 0; only head 1 looks at position 2, so only row 0 may show it.
    q, k = torch.zeros(1, 4, 2), torch.zeros(5, 2, 2)
    q[0, 1, 0], k[2, 0, 0] = 1.0, 50.0
    got = module.window_scores(q, k, scaling=1.0, pool_kernel=1)
    torch.testing.assert_close(got[0], torch.tensor([0.2, 0.2, 1.2, 0.2]))
    torch.testing.assert_close(got[1], torch.tensor([0.4] * 4))


@BOTH
def test_peaks_of_uniform_attention_by_hand(module) -> None:
    # The two rows see 5 and 6 keys: the largest weight is 1/5, however many heads and rows give it.
    got = module.window_peaks(torch.zeros(2, 4, 8), torch.randn(6, 2, 8), scaling=1.0)
    torch.testing.assert_close(got, torch.full((2, 4), 1 / 5))


@BOTH
def test_one_look_of_one_head_is_a_peak(module) -> None:
    # Of 16 queries and 2 heads a KV head, one looks at position 2; KV head 1 sees nothing of it.
    q, k = torch.zeros(16, 4, 2), torch.zeros(40, 2, 2)
    q[3, 1, 0], k[2, 0, 0] = 1.0, 50.0
    got = module.window_peaks(q, k, scaling=1.0)
    flat = torch.full((24,), 1 / 25)  # what the window's first row gives to each of the 25 keys it sees
    torch.testing.assert_close(got[1], flat)
    flat[2] = 1.0
    torch.testing.assert_close(got[0], flat)


@BOTH
def test_a_broken_query_spoils_its_own_kv_head_alone(module) -> None:
    q, k = _inputs(CASES[2])
    for function in (module.window_peaks, lambda *a, **kw: module.window_scores(*a, **kw, pool_kernel=1)):
        broken = q.clone()
        broken[4, 5, 2] = torch.nan  # query heads 3 to 5 read KV head 1
        got, sound = function(broken, k, scaling=0.25), function(q, k, scaling=0.25)
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], sound[[0, 2]]) and sound.isfinite().all()


@BOTH
def test_the_scaling_is_applied(module) -> None:
    q, k = torch.ones(1, 1, 1), torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1)
    got = module.window_scores(q, k, scaling=0.5, pool_kernel=1)
    weight = torch.tensor(0.5).exp()
    torch.testing.assert_close(got[0], torch.stack((1 / (2 + weight), weight / (2 + weight))))


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fast_equals_naive(case: Case, dtype: torch.dtype) -> None:
    q, k = _inputs(case, dtype)
    got = scoring.window_scores(q, k, scaling=case.dim**-0.5, pool_kernel=case.pool)
    assert got.dtype == torch.float32
    assert got.shape == (case.kv_heads, case.tokens - case.window)
    expected = naive.window_scores(q, k, scaling=case.dim**-0.5, pool_kernel=case.pool)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-7)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fast_peaks_equal_naive(case: Case, dtype: torch.dtype) -> None:
    q, k = _inputs(case, dtype)
    got = scoring.window_peaks(q, k, scaling=case.dim**-0.5)
    assert got.dtype == torch.float32 and got.shape == (case.kv_heads, case.tokens - case.window)
    torch.testing.assert_close(got, naive.window_peaks(q, k, scaling=case.dim**-0.5), rtol=2e-5, atol=1e-7)


def test_small_probabilities_do_not_tie_in_half_precision() -> None:
    # Both weights are below the smallest fp16 number; the ranking still has to tell them apart.
    k = torch.tensor([0.0, 0.5, 20.0]).reshape(3, 1, 1).half()
    got = scoring.window_scores(torch.ones(1, 1, 1).half(), k, scaling=1.0, pool_kernel=1)
    assert 0 < got[0, 0] < got[0, 1] < 1e-7


def test_large_logits_do_not_overflow() -> None:
    q, k = _inputs(CASES[3])
    got = scoring.window_scores(1e3 * q, k, scaling=1.0, pool_kernel=7)
    expected = naive.window_scores(1e3 * q, k, scaling=1.0, pool_kernel=7)
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=1e-4)


def test_views_of_a_larger_buffer_score_the_same() -> None:
    case = CASES[5]
    q, k = _inputs(case)
    packed = torch.randn(case.tokens, case.kv_heads + 2, case.dim + 3)
    packed[:, 1 : 1 + case.kv_heads, : case.dim] = k
    view = packed[:, 1 : 1 + case.kv_heads, : case.dim]
    got = scoring.window_scores(q, view, scaling=0.125, pool_kernel=7)
    torch.testing.assert_close(got, scoring.window_scores(q, k, scaling=0.125, pool_kernel=7))


@pytest.mark.parametrize("budget", [1, 400_000])
def test_scoring_by_groups_of_heads_changes_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[5]
    q, k = _inputs(case)
    whole = scoring.window_scores(q, k, scaling=0.125, pool_kernel=7)
    peaks = scoring.window_peaks(q, k, scaling=0.125)
    monkeypatch.setattr(scoring, "_TEMPORARY_BYTES", budget)
    torch.testing.assert_close(scoring.window_scores(q, k, scaling=0.125, pool_kernel=7), whole)
    torch.testing.assert_close(scoring.window_peaks(q, k, scaling=0.125), peaks)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 100])
def test_shares_are_the_mean_weight_over_queries_and_heads(window: int) -> None:
    """Of a window in one part and in several; with what it gives to itself they are all of its attention."""
    case = Case(tokens=window + 40, window=window, heads=6, kv_heads=3, dim=16, pool=1)
    q, k = _inputs(case)
    shares = scoring.window_shares(q, k, scaling=0.25)
    weights = torch.zeros(case.heads, window, case.tokens, dtype=torch.float64)
    for head in range(case.heads):
        logits = 0.25 * q[:, head].double() @ k[:, head // 2].double().T
        for row in range(window):
            seen = case.tokens - window + row + 1
            weights[head, row, :seen] = torch.softmax(logits[row, :seen], dim=0)
    torch.testing.assert_close(shares.double(), weights.mean((0, 1))[:40], rtol=1e-5, atol=1e-8)
    assert shares.sum() < 1


def test_shares_of_a_long_window_take_no_more_memory_than_of_a_short_one() -> None:
    sizes = []
    for window in (scoring.SHARED, 16 * scoring.SHARED):
        case = Case(tokens=3000, window=window, heads=9, kv_heads=3, dim=64, pool=1)
        q, k = _inputs(case)
        with _LargestTensor() as seen:
            scoring.window_shares(q, k, scaling=0.125)
        sizes.append(seen.largest)
    assert sizes[1] <= sizes[0]


class _LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel() * out.element_size())
        return out


def test_no_square_matrix_is_ever_made() -> None:
    case = Case(tokens=3000, window=8, heads=9, kv_heads=3, dim=64, pool=7)
    q, k = _inputs(case, torch.bfloat16)
    with _LargestTensor() as seen:
        scoring.window_scores(q, k, scaling=0.125, pool_kernel=7)
    # The two large ones are k in fp32 and the [heads, W, N] logits; one [N, N] matrix has 36 MB.
    assert 0 < seen.largest <= 4 * case.tokens * max(case.kv_heads * case.dim, case.heads * case.window)


def test_temporaries_of_a_long_prompt_stay_within_a_group_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tokens=3000, window=8, heads=9, kv_heads=3, dim=64, pool=7)
    q, k = _inputs(case, torch.bfloat16)
    monkeypatch.setattr(scoring, "_TEMPORARY_BYTES", 1)
    with _LargestTensor() as seen:
        scoring.window_scores(q, k, scaling=0.125, pool_kernel=7)
    assert 0 < seen.largest <= 4 * case.tokens * case.dim


@pytest.mark.parametrize("name", ["window_scores", "window_peaks"])
@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((8, 4, 8), (8, 2, 8)),  # N == W
        ((8, 4, 8), (7, 2, 8)),
        ((8, 5, 8), (20, 2, 8)),
        ((8, 4, 8), (20, 2, 16)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, q_shape: tuple, k_shape: tuple) -> None:
    more = {"pool_kernel": 7} if name == "window_scores" else {}
    with pytest.raises(ValueError, match=f"{name}: q .*more keys than queries"):
        getattr(scoring, name)(torch.zeros(q_shape), torch.zeros(k_shape), scaling=1.0, **more)


@pytest.mark.parametrize("pool", [4, 0, -1])
def test_a_pool_that_is_not_odd_is_refused(pool: int) -> None:
    with pytest.raises(ValueError, match=f"window_scores: pool_kernel {pool} must be odd"):
        scoring.window_scores(torch.zeros(8, 4, 8), torch.zeros(20, 2, 8), scaling=1.0, pool_kernel=pool)
