"""Attention mass and peaks in Triton against plain loops, in Triton's interpreter (how, and that it leaves no trace:
tests/interpreter.py and test_triton_interpreter.py). On a real GPU: tests/gpu/test_kernels_gpu.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from claa_sglang.kernels import naive
from tests import interpreter
from tests.paged import Batch, Shape, dequantised, make_batch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [
    Shape((9,), 8, 4, 2, 16, FP32),  # one position is ranked
    Shape((2, 40), 1, 1, 1, 16, BF16),  # one query, one head
    Shape((40, 9, 70), 8, 9, 3, 64, BF16),  # three requests; a group of 3
    Shape((130, 129), 5, 7, 1, 96, FP16),  # head size and group no power of two; ends right after a tile
    Shape((64,), 8, 16, 1, 128, BF16),  # 128 query rows: two tiles
    Shape((75,), 23, 6, 2, 192, BF16),  # 69 query rows; the window spans tiles of keys
    Shape((33,), 4, 5, 5, 256, FP16),  # no grouping
    Shape((140,), 130, 2, 2, 16, FP32),  # most of the prompt is window: whole tiles of keys are in a row's future
    Shape((70,), 8, 4, 2, 128, FP32),
    Shape((40, 9, 70), 8, 9, 3, 64, BF16, fp8_keys=True),
]
# Fewer queries than the window has, which all see the window's tokens before them: those are in the softmax alone.
LAST_QUERIES = [
    (Shape((60,), 32, 4, 2, 16, FP32), 8),
    (Shape((33, 150, 40), 32, 9, 3, 64, BF16), 1),
    (Shape((140,), 130, 6, 2, 16, FP16), 5),  # whole tiles of keys between the ranked ones and the queries
    (Shape((90,), 40, 4, 1, 128, BF16), 31),  # 124 query rows: two tiles
]


@pytest.fixture(scope="module")
def kernel() -> Any:
    return interpreter.load("window_attention")


def run(kernel: Any, batch: Batch, shape: Shape, scaling: float | None = None, **of: Any) -> Tensor:
    """of: `queries` and `peaks`."""
    return kernel.window_mass(
        batch.q,
        batch.key_buffer,
        batch.table,
        batch.requests,
        window=shape.window,
        scaling=shape.dim**-0.5 if scaling is None else scaling,
        max_tokens=batch.max_tokens,
        positions=batch.positions,
        **of,
    )


def expected(batch: Batch, shape: Shape, scaling: float | None = None, **of: Any) -> Tensor:
    scaling = shape.dim**-0.5 if scaling is None else scaling
    return naive.window_mass(*dequantised(batch)[:4], window=shape.window, scaling=scaling, **of)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mass_equals_naive(kernel: Any, shape: Shape) -> None:
    batch = make_batch(shape)
    got = run(kernel, batch, shape)
    assert got.dtype == torch.float32 and got.shape == (shape.kv_heads * batch.positions,)
    torch.testing.assert_close(got, expected(batch, shape), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.dim != 256], ids=str)
def test_peaks_equal_naive(kernel: Any, shape: Shape) -> None:
    batch = make_batch(shape)
    got = run(kernel, batch, shape, peaks=True)
    assert got.dtype == torch.float32 and got.shape == (shape.kv_heads * batch.positions,)
    torch.testing.assert_close(got, expected(batch, shape, peaks=True), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("shape", "queries"), LAST_QUERIES, ids=str)
@pytest.mark.parametrize("peaks", [False, True], ids=["sum", "max"])
def test_the_last_queries_alone_equal_naive(kernel: Any, shape: Shape, queries: int, peaks: bool) -> None:
    batch = make_batch(shape)
    # The queries before them may be anything.
    for first_row in batch.requests[0].tolist():
        batch.q[first_row : first_row + shape.window - queries] = torch.nan
    got = run(kernel, batch, shape, queries=queries, peaks=peaks)
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected(batch, shape, queries=queries, peaks=peaks), rtol=2e-5, atol=1e-7)


def lse_of(batch: Batch, shape: Shape, queries: int) -> Tensor:
    """fp32 `[R, kv_heads, queries * group]`, to the base 2, in fp64 torch: what `window_mass` may be given."""
    group, out = shape.heads // shape.kv_heads, []
    future = torch.ones(queries, queries, dtype=torch.bool).triu(1)
    for first_row, table_row, tokens, _ in batch.requests.T.tolist():
        rows = slice(first_row + shape.window - queries, first_row + shape.window)
        keys = batch.key_buffer[batch.table[table_row, :tokens].long()].double()
        q = batch.q[rows].double().view(queries, shape.kv_heads, group, shape.dim)
        logits = torch.einsum("wkgd,nkd->kwgn", q, keys) * shape.dim**-0.5
        logits[..., tokens - queries :].masked_fill_(future[None, :, None], -torch.inf)
        out.append(logits.logsumexp(-1).flatten(1) / math.log(2))
    return torch.stack(out).float()


@pytest.mark.parametrize("peaks", [False, True], ids=["sum", "max"])
def test_a_log_sum_exp_that_is_given_is_used(kernel: Any, peaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, queries = LAST_QUERIES[0]
    batch = make_batch(shape)
    lse = lse_of(batch, shape, queries)
    of: dict[str, Any] = {"queries": queries, "peaks": peaks}
    got = run(kernel, batch, shape, lse=lse, **of)
    torch.testing.assert_close(got, expected(batch, shape, **of), rtol=2e-5, atol=1e-7)
    # One more in it halves every weight, which only the given one can have done.
    torch.testing.assert_close(run(kernel, batch, shape, lse=lse + 1, **of), got / 2)
    for name in ("_partial_lse_kernel", "_merge_lse_kernel"):
        monkeypatch.delattr(kernel.module, name)
    assert torch.equal(run(kernel, batch, shape, lse=lse, **of), got)


@pytest.mark.parametrize(
    "lse",
    [torch.zeros(1, 2, 15), torch.zeros(1, 2, 16, dtype=torch.float64), torch.zeros(1, 16, 2).transpose(1, 2)],
    ids=["shape", "dtype", "strides"],
)
def test_a_log_sum_exp_that_does_not_fit_is_refused(kernel: Any, lse: Tensor) -> None:
    shape = Shape((40,), 8, 4, 2, 16, FP32)
    with pytest.raises(ValueError, match=r"window_mass: lse is .*needs contiguous fp32 \(1, 2, 16\)"):
        run(kernel, make_batch(shape), shape, lse=lse)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_splits_of_several_tiles_of_keys(kernel: Any, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape((600, 11, 300), 8, 3, 1, 16, FP16)  # tiles of 128 keys
    monkeypatch.setattr(kernel.module, "_most_splits", lambda rows: splits)
    batch = make_batch(shape)
    torch.testing.assert_close(run(kernel, batch, shape), expected(batch, shape), rtol=2e-5, atol=1e-7)


def test_uniform_attention_by_hand(kernel: Any) -> None:
    # Zero queries: a row that sees n keys gives each 1/n. N = 6, W = 2: the rows see 5 and 6; two heads double it.
    shape = Shape((6,), 2, 4, 2, 16, FP32)
    batch = make_batch(shape, spread=0.0)
    torch.testing.assert_close(run(kernel, batch, shape), torch.full((8,), 2 * (1 / 5 + 1 / 6)))
    torch.testing.assert_close(run(kernel, batch, shape, queries=1), torch.full((8,), 2 / 6))
    torch.testing.assert_close(run(kernel, batch, shape, peaks=True), torch.full((8,), 1 / 5))
    torch.testing.assert_close(run(kernel, batch, shape, queries=1, peaks=True), torch.full((8,), 1 / 6))


def test_small_probabilities_do_not_tie(kernel: Any) -> None:
    shape = Shape((3,), 1, 1, 1, 16, FP16)
    batch = make_batch(shape, spread=0.0)
    batch.q[3, 0, 0] = 1.0
    batch.key_buffer[batch.table[1, :3].long(), 0, 0] = torch.tensor([0.0, 0.5, 20.0]).half()
    low, high = run(kernel, batch, shape, scaling=1.0).tolist()
    assert 0 < low < high < 1e-7


def test_large_logits_do_not_overflow(kernel: Any) -> None:
    shape = Shape((63, 20), 8, 6, 6, 16, FP32)
    batch = make_batch(shape, spread=40.0)
    got = run(kernel, batch, shape, scaling=1.0)
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected(batch, shape, scaling=1.0), rtol=5e-3, atol=1e-4)


def test_a_request_does_not_depend_on_its_neighbours(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # As for long prompts: few splits, and fewer of them the more rows there are. Many rows, as the rounding of the
    # log-sum-exp hides the order of most sums.
    monkeypatch.setattr(kernel.module, "_most_splits", lambda rows: max(1, 512 // rows))
    shape = Shape((600, 700), 128, 1, 1, 16, BF16)
    batch = make_batch(shape)
    together = run(kernel, batch, shape)
    requests = batch.requests[:, :1].contiguous()
    alone = run(kernel, batch._replace(requests=requests, max_tokens=600, positions=472), shape)
    assert torch.equal(together[: alone.numel()], alone)


def test_a_broken_key_spoils_its_own_head_alone(kernel: Any) -> None:
    shape = Shape((40, 30), 8, 4, 2, 16, FP32)
    batch = make_batch(shape)
    sound = run(kernel, batch, shape)
    batch.key_buffer[batch.table[2, 5].long(), 1, 3] = torch.nan  # first request, KV head 1
    got = run(kernel, batch, shape)
    assert bool(got[32:64].isnan().all())
    assert torch.equal(got[:32], sound[:32]) and torch.equal(got[64:], sound[64:])


@pytest.mark.parametrize("peaks", [False, True], ids=["sum", "max"])
def test_a_broken_query_spoils_its_own_head_alone(kernel: Any, peaks: bool) -> None:
    shape = Shape((40, 30), 8, 4, 2, 16, FP32)
    batch = make_batch(shape)
    sound = run(kernel, batch, shape, peaks=peaks)
    batch.q[batch.requests[0, 0] + 5, 3, 0] = torch.nan  # first request, a query head of KV head 1
    got = run(kernel, batch, shape, peaks=peaks)
    assert bool(got[32:64].isnan().all())
    assert torch.equal(got[:32], sound[:32]) and torch.equal(got[64:], sound[64:])


class _Allocated(TorchDispatchMode):
    """Bytes of all tensors made by factory functions."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like):
            self.total += out.numel() * out.element_size()
        return out


@pytest.mark.parametrize(("shape", "queries"), [(SHAPES[2], 8), (SHAPES[4], 8), LAST_QUERIES[0]], ids=str)
def test_the_workspace_is_what_is_promised(kernel: Any, shape: Shape, queries: int) -> None:
    batch = make_batch(shape)
    with _Allocated() as seen:
        result = run(kernel, batch, shape, queries=queries)
    assert 0 < seen.total - 4 * result.numel() <= 1028 * len(shape.tokens) * shape.heads * queries


@pytest.mark.parametrize("queries", [0, -1, 9])
def test_queries_outside_the_window_are_refused(kernel: Any, queries: int) -> None:
    shape = Shape((40,), 8, 4, 2, 16, FP32)
    with pytest.raises(ValueError, match=f"window_mass: queries {queries} must be 1 to 8"):
        run(kernel, make_batch(shape), shape, queries=queries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 5, 16)}, "multiple of kv_heads"),
        ({"q": torch.zeros(8, 4, 32)}, "equal head size"),
        ({"q": torch.zeros(8, 4, 16, dtype=FP16)}, "one of bf16"),
        ({"q": torch.zeros(8, 4, 32)[..., ::2]}, "last stride"),
        ({"table": torch.zeros(2, 50, dtype=torch.int64)}, "table is torch.int64"),
        ({"requests": torch.zeros(3, 1, dtype=torch.int32)}, r"\(3, 1\)"),
        ({"requests": torch.zeros(4, 0, dtype=torch.int32)}, "0 requests"),
        ({"max_tokens": 8}, "more tokens than the window"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_refused(kernel: Any, change: dict, message: str) -> None:
    shape = Shape((40,), 8, 4, 2, 16, FP32)
    with pytest.raises(ValueError, match=f"window_mass: .*{message}"):
        run(kernel, make_batch(shape)._replace(**change), shape)
