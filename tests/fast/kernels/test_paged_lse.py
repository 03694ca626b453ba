"""The log-sum-exp by FlashInfer's paged attention, with torch in FlashInfer's place: what it is told, and what is made
of its answer. On a real GPU: tests/gpu/test_scorers_gpu.py."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from claa_sglang.kernels import naive, paged_lse
from claa_sglang.kernels.layout import Row
from tests import interpreter
from tests.paged import Batch, Shape, make_batch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class TorchWrapper:
    """Stands for FlashInfer's wrapper: as its documentation says, in fp64 torch."""

    plans = 0

    def plan(self, qo: Tensor, kv: Tensor, indices: Tensor, last: Tensor, heads: int, kv_heads: int, dim: int,
             page_size: int, **of: Any) -> None:  # fmt: skip
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (qo, kv, indices, last, of["seq_lens"]))
        assert of["causal"] and page_size == 1 and last.tolist() == [1] * (len(qo) - 1)
        assert of["seq_lens"].tolist() == kv.diff().tolist() and int(kv[-1]) == len(indices)
        self.plans += 1
        self._told, self._heads, self._scale = (qo.tolist(), kv.tolist(), indices.long()), heads, of["sm_scale"]

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor], *, q_scale: float, out: Tensor, lse: Tensor,
            return_lse: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        keys, values = cache
        assert return_lse and keys.data_ptr() == values.data_ptr() and keys.stride() == values.stride()
        assert keys.shape[1] == 1 and out.shape == q.shape
        (qo, kv, indices), group = self._told, self._heads // keys.shape[2]
        for i in range(len(qo) - 1):
            own = q[qo[i] : qo[i + 1]].double().unflatten(1, (-1, group))
            seen = keys[indices[kv[i] : kv[i + 1]], 0].double()
            logits = torch.einsum("wkgd,nkd->wkgn", own, seen) * self._scale * q_scale
            rows, tokens = own.shape[0], seen.shape[0]
            future = torch.ones(rows, tokens, dtype=torch.bool).triu(tokens - rows + 1)
            logits = logits.masked_fill(future[:, None, None], -torch.inf)
            lse[qo[i] : qo[i + 1]] = (logits.logsumexp(-1).flatten(1) / math.log(2)).float()
        return out, lse


@pytest.fixture
def wrapper(monkeypatch: pytest.MonkeyPatch) -> TorchWrapper:
    made = TorchWrapper()
    monkeypatch.setattr(paged_lse, "_take", lambda device: SimpleNamespace(wrapper=made, mark=lambda: None))
    monkeypatch.setattr(paged_lse, "_free", {})
    return made


def plan_of(batch: Batch, shape: Shape, queries: int) -> paged_lse.PagedLse:
    first_rows, table_rows, tokens = batch.requests[[Row.FIRST_ROW, Row.TABLE_ROW, Row.TOKENS]].tolist()
    return paged_lse.PagedLse(
        batch.table, first_rows, table_rows, tokens, window=shape.window, queries=queries, heads=shape.heads,
        kv_heads=shape.kv_heads, head_dim=shape.dim, dtype=shape.dtype,
    )  # fmt: skip


@pytest.mark.parametrize(("queries", "heads"), [(8, 6), (8, 2), (1, 6), (3, 14)], ids=str)
@pytest.mark.parametrize("peaks", [False, True], ids=["sum", "max"])
@pytest.mark.parametrize("tokens", [(40,), (70, 9, 33)], ids=str)
def test_the_mass_with_it_equals_naive(
    tokens: tuple[int, ...], queries: int, heads: int, peaks: bool, wrapper: TorchWrapper
) -> None:
    shape = Shape(tokens, 8, heads, 2, 64, BF16)
    batch = make_batch(shape)
    window_mass = interpreter.load("window_attention").window_mass
    plan = plan_of(batch, shape, queries)
    for layer in (batch, make_batch(shape, seed=1)):  # the same slots and rows, other numbers
        batch.q.copy_(layer.q)
        batch.key_buffer.copy_(layer.key_buffer)
        lse = plan(batch.q, batch.key_buffer, 0.1)
        of: dict[str, Any] = {"window": 8, "scaling": 0.1, "queries": queries, "peaks": peaks}
        got = window_mass(*batch[:4], max_tokens=batch.max_tokens, positions=batch.positions, lse=lse, **of)
        torch.testing.assert_close(got, naive.window_mass(*batch[:4], **of), rtol=2e-5, atol=1e-7)
    assert wrapper.plans == 1


def test_a_wrapper_is_given_back_with_its_plan(wrapper: TorchWrapper) -> None:
    shape = Shape((40,), 8, 6, 2, 64, BF16)
    plan = plan_of(make_batch(shape), shape, 8)
    assert not paged_lse._free
    del plan
    assert [held.wrapper for held in paged_lse._free[torch.device("cpu")]] == [wrapper]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_flashinfer_takes(dtype: torch.dtype, head_dim: int) -> None:
    assert paged_lse.takes(dtype, head_dim)


@pytest.mark.parametrize(("dtype", "head_dim"), [(FP32, 128), (BF16, 96), (FP16, 16)])
def test_what_it_does_not(dtype: torch.dtype, head_dim: int) -> None:
    assert not paged_lse.takes(dtype, head_dim) and not paged_lse.is_ready(dtype, head_dim)
    with pytest.raises(ValueError, match="needs bf16 or fp16 and one of"):
        plan_of(make_batch(shape := Shape((40,), 8, 4, 2, head_dim, dtype)), shape, 8)


def test_asking_whether_it_is_ready_imports_and_compiles_nothing() -> None:
    code = (
        "import sys, torch; from claa_sglang.kernels import paged_lse as p;"
        "assert not p.is_ready(torch.bfloat16, 128); assert 'flashinfer' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_host_numbers() -> None:
    assert paged_lse.host_plan([5, 9, 4], 3) == ([0, 3, 6, 9], [0, 5, 14, 18])
    cpu = torch.device("cpu")
    assert paged_lse.window_rows([7], 8, 2, cpu) == slice(13, 15)
    assert paged_lse.window_rows([7, 20], 8, 2, cpu).tolist() == [13, 14, 26, 27]  # type: ignore[union-attr]
    # One H200: two programs on each of 132 multiprocessors, twice the room that 128 rows of 128 numbers take.
    assert paged_lse._workspace_bytes(132) == 2 * 4 * 2 * 132 * 129 * 128


@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (4, 1), (1, 1)])
def test_layout_by_kv_head(requests: int, queries: int, heads: int, kv_heads: int) -> None:
    lse, group = torch.randn(requests * queries, heads), heads // kv_heads
    got = paged_lse.by_kv_head(lse, queries, kv_heads)
    assert got.shape == (requests, kv_heads, queries * group) and got.is_contiguous()
    for request in range(requests):
        for head in range(heads):
            for query in range(queries):
                place = got[request, head // group, query * group + head % group]
                assert place == lse[request * queries + query, head]
