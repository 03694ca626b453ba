"""Attention mass in Triton against plain loops, in Triton's interpreter (how, and that it leaves no trace:
tests/interpreter.py and test_triton_interpreter.py). On a real GPU: tests/gpu/test_kernels_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from claa_sglang.kernels import naive
from tests import interpreter
from tests.paged import Batch, Shape, make_batch

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
]


@pytest.fixture(scope="module")
def kernel() -> Any:
    return interpreter.load("window_attention")


def run(kernel: Any, batch: Batch, shape: Shape, scaling: float | None = None) -> Tensor:
    return kernel.window_mass(
        batch.q,
        batch.key_buffer,
        batch.table,
        batch.requests,
        window=shape.window,
        scaling=shape.dim**-0.5 if scaling is None else scaling,
        max_tokens=batch.max_tokens,
        positions=batch.positions,
    )


def expected(batch: Batch, shape: Shape, scaling: float | None = None) -> Tensor:
    scaling = shape.dim**-0.5 if scaling is None else scaling
    return naive.window_mass(*batch[:4], window=shape.window, scaling=scaling)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mass_equals_naive(kernel: Any, shape: Shape) -> None:
    batch = make_batch(shape)
    got = run(kernel, batch, shape)
    assert got.dtype == torch.float32 and got.shape == (shape.kv_heads * batch.positions,)
    torch.testing.assert_close(got, expected(batch, shape), rtol=2e-5, atol=1e-7)


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


class _Allocated(TorchDispatchMode):
    """Bytes of all tensors made by factory functions."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like):
            self.total += out.numel() * out.element_size()
        return out


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
def test_the_workspace_is_what_is_promised(kernel: Any, shape: Shape) -> None:
    batch = make_batch(shape)
    with _Allocated() as seen:
        result = run(kernel, batch, shape)
    rows = shape.window * shape.heads // shape.kv_heads
    promised = kernel.workspace_bytes(len(shape.tokens), shape.kv_heads, rows)
    assert 0 < seen.total - 4 * result.numel() <= promised


def test_the_workspace_does_not_grow_with_the_prompt(kernel: Any) -> None:
    # W 8, group 4: 32 rows x 128 splits x 2 numbers; the largest window of the widest group.
    assert kernel.workspace_bytes(1, 8, 32) == 4 * 8 * 32 * 257
    assert kernel.workspace_bytes(1, 1, 1024 * 16) == 4 * 16384 * 17


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
