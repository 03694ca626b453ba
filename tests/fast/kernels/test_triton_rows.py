"""Boundary states in Triton against plain loops, bit for bit, in Triton's interpreter (how, and that it leaves no
trace: tests/interpreter.py and test_triton_interpreter.py). On a real GPU: tests/gpu/test_kernels_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from claa_sglang.kernels import naive
from claa_sglang.memory.boundary import BoundaryStore
from tests import interpreter
from tests.fast.memory.test_boundary import DTYPES, SLOTS, bits, make_buffers, random_bits


@pytest.fixture(scope="module")
def kernel() -> Any:
    return interpreter.load("rows")


def counts_of(widths: list[int], total: int) -> list[int]:
    """Elements of the state in each buffer, in order, until all are placed."""
    counts = []
    for width in widths:
        if total:
            counts.append(min(width, total))
            total -= counts[-1]
    return counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20, deadline=None)
@given(
    hidden=st.integers(1, 23),
    widths=st.lists(st.integers(1, 17), min_size=1, max_size=5),
    slots=st.lists(st.integers(0, SLOTS - 1), unique=True, min_size=1, max_size=4),
    with_rows=st.booleans(),
    seed=st.integers(0, 99),
)
def test_states_equal_naive(
    kernel: Any, dtype: torch.dtype, hidden: int, widths: list[int], slots: list[int], with_rows: bool, seed: int
) -> None:
    if sum(widths) < hidden:
        return
    is_pair = sum(widths) >= 2 * hidden
    counts = counts_of(widths, hidden * (2 if is_pair else 1))
    got, want = make_buffers(widths, dtype), make_buffers(widths, dtype)
    parts, vector = kernel.make_parts(got[: len(counts)], counts)
    index = torch.tensor(slots)
    # Any bits for a pair; a sum of NaNs has no defined bits.
    make = random_bits if is_pair else lambda n, width, dtype, seed: torch.randn(n, width).to(dtype)
    source = torch.arange(len(slots)).flip(0) + 1 if with_rows else None
    h, r = (make(len(slots) + 2 * with_rows, hidden, dtype, seed + i) for i in range(2))

    kernel.store(parts, index, h, r, is_pair=is_pair, vector=vector, rows=source)
    own_h, own_r = (h, r) if source is None else (h[source], r[source])
    naive.store(want[: len(counts)], counts, index, own_h, own_r, is_pair=is_pair)
    for a, b in zip(got, want, strict=True):
        if is_pair or dtype != torch.bfloat16:
            assert torch.equal(bits(a), bits(b))
        else:  # the interpreter cuts fp32 off to bf16, a GPU rounds
            torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
    want = [buffer.clone() for buffer in got]

    # Into the middle of larger tensors, in another order.
    outs = [torch.full((len(slots) + 2, hidden + 3), 5.0, dtype=dtype) for _ in range(2)]
    back = index.flip(0)
    kernel.load(parts, back, *(o[1:-1, :hidden] for o in outs), is_pair=is_pair, vector=vector)
    refs = [torch.full((len(slots) + 2, hidden + 3), 5.0, dtype=dtype) for _ in range(2)]
    naive.load(want[: len(counts)], counts, back, *(o[1:-1, :hidden] for o in refs), is_pair=is_pair)
    for a, b in zip(outs, refs, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("widths", [[2048, 2048], [2048], [1000, 1000, 1000]], ids=str)
def test_parts_longer_than_a_block_equal_the_boundary_store(kernel: Any, widths: list[int]) -> None:
    ours, theirs = make_buffers(widths), make_buffers(widths)
    store = BoundaryStore(theirs, 1300, torch.float32)
    counts = counts_of(widths, 2600 if store.is_pair else 1300)
    parts, vector = kernel.make_parts(ours[: len(counts)], counts)
    slots, states = torch.tensor([7, 0, 11]), torch.randn(2, 3, 1300)
    store.store(slots, *states)
    kernel.store(parts, slots, *states, is_pair=store.is_pair, vector=vector)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    loaded = torch.empty(2, 3, 1300)
    kernel.load(parts, slots, *loaded, is_pair=store.is_pair, vector=vector)
    for a, b in zip(loaded, store.load(slots), strict=True):
        assert torch.equal(a, b)


def test_no_rows_are_no_launch(kernel: Any) -> None:
    buffers = make_buffers([8])
    parts, vector = kernel.make_parts(buffers, [8])
    nothing = torch.empty(0, 4)
    for function in (kernel.store, kernel.load):
        function(parts, torch.empty(0, dtype=torch.int64), nothing, nothing, is_pair=True, vector=vector)
    assert bool((buffers[0] == -7.0).all())


@pytest.mark.parametrize(
    ("widths", "counts", "vector"),
    [([64, 64], [64, 64], 8), ([64, 64], [64, 60], 4), ([64, 6], [64, 4], 2), ([7, 64], [7, 64], 1)],
    ids=str,
)
def test_alignment_is_that_of_the_worst_part(kernel: Any, widths: list[int], counts: list[int], vector: int) -> None:
    parts, got = kernel.make_parts(make_buffers(widths), counts)
    assert got == vector
    assert parts.shape == (4, 2) and parts[1:].tolist() == [widths, [0, counts[0]], counts]


def test_what_does_not_fit_is_refused(kernel: Any) -> None:
    buffers = make_buffers([8, 8])
    with pytest.raises(ValueError, match="0 buffers"):
        kernel.make_parts([], [])
    with pytest.raises(ValueError, match="9 elements"):
        kernel.make_parts(buffers, [8, 9])
    with pytest.raises(ValueError, match="after buffers"):
        kernel.make_parts([buffers[0], buffers[1].half()], [8, 8])
    parts, vector = kernel.make_parts(buffers, [8, 8])

    def store(slots: Tensor, hidden: Tensor, residual: Tensor) -> None:
        kernel.store(parts, slots, hidden, residual, is_pair=True, vector=vector)

    good, slots = torch.zeros(3, 8), torch.arange(3)
    with pytest.raises(ValueError, match="int64"):
        store(slots.int(), good, good)
    with pytest.raises(ValueError, match="residual"):
        store(slots, good, good[:2])
    with pytest.raises(ValueError, match="3 slots"):
        store(slots, good[:2], good[:2])
    with pytest.raises(ValueError, match=r"\(2,\) rows of them"):
        kernel.store(parts, slots, good, good, is_pair=True, vector=vector, rows=slots[:2])
    with pytest.raises(ValueError, match="last stride"):
        store(slots, torch.zeros(3, 16)[:, ::2], good)
    with pytest.raises(ValueError, match="3 slots"):
        kernel.load(parts, slots, good[:2], good[:2], is_pair=True, vector=vector)
