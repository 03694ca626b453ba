"""Boundary states in and out of late-layer KV buffers, all buffers in one launch, in Triton.

Where the prune of CLAA (arXiv 2602.16054, step 6) finds the hidden states of tokens outside its chunk. The state of a
slot, `[hidden | residual]` or their sum, is cut into parts, and each part lies in the slot's row of another buffer.
claa_sglang/memory/boundary.py does the same with one torch call per buffer, naive.py with plain loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
# Most elements that are moved at once: 16 bytes of the smallest dtype.
_VECTOR = 8


def make_parts(buffers: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, int]:
    """Describe where the parts of a state are; made once, as the buffers never move.

    Args:
        buffers: `[slots, ...]` of one dtype and device, each slot's elements contiguous. The caller keeps them alive.
        counts: per buffer, the elements of the state that lie at the start of a slot's row; positive.

    Returns:
        parts: int64 `[4, P]` on the buffers' device: address, elements between slots, first element of the state,
            elements.
        vector: elements to which all of them are aligned, for `store` and `load`.

    Waits for the device.

    Raises:
        ValueError: no buffers, a count that does not fit its buffer, or buffers that differ.
    """
    if not buffers or len(buffers) != len(counts):
        raise ValueError(f"make_parts: {len(buffers)} buffers, {len(counts)} counts; needs one count for each")
    dtype, device, size = buffers[0].dtype, buffers[0].device, buffers[0].element_size()
    parts, first, vector = [], 0, _VECTOR
    for buffer, count in zip(buffers, counts, strict=True):
        row = buffer[0].numel()
        if (buffer.dtype, buffer.device) != (dtype, device) or not buffer[0].is_contiguous() or not 0 < count <= row:
            raise ValueError(
                f"make_parts: {count} elements per slot in {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}, "
                f"after buffers of {dtype} on {device}"
            )
        parts.append((buffer.data_ptr(), buffer.stride(0), first, count))
        vector = math.gcd(vector, buffer.data_ptr() // size, buffer.stride(0), first, count)
        first += count
    return torch.tensor(parts, dtype=torch.int64, device=device).T.contiguous(), vector


def store(
    parts: Tensor,
    slots: Tensor,
    hidden: Tensor,
    residual: Tensor,
    *,
    is_pair: bool,
    vector: int,
    rows: Tensor | None = None,
) -> None:
    """Write the states of `slots`.

    Args:
        parts, vector: of `make_parts`; the counts sum to 2 H for a pair, H for a sum.
        slots: int64 `[n]`, contiguous. Of equal slots one wins, part by part.
        hidden, residual: `[rows, H]`, last stride 1, of the buffers' dtype: nothing here checks that.
        is_pair: whether hidden and residual are stored side by side, bit for bit, or as their sum (fp32, then rounded).
        rows: int64 `[n]`, contiguous: which rows of hidden and residual belong to the slots; None: row i to slot i.

    One launch, grid (n, P); none for n = 0. Allocates nothing and never waits for the GPU.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    _check("store", parts, slots, hidden, residual)
    if hidden.shape[0] != slots.shape[0] if rows is None else (rows.shape, rows.dtype) != (slots.shape, slots.dtype):
        chosen = "" if rows is None else f", {rows.dtype} {tuple(rows.shape)} rows of them"
        raise ValueError(f"store: {slots.shape[0]} slots for {tuple(hidden.shape)} states{chosen}")
    if slots.shape[0]:
        _store_kernel[(slots.shape[0], parts.shape[1])](
            parts, slots, slots if rows is None else rows, hidden, residual, hidden.stride(0), residual.stride(0),
            HIDDEN=hidden.shape[1], IS_PAIR=is_pair, HAS_ROWS=rows is not None,
            VECTOR=vector, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


def load(parts: Tensor, slots: Tensor, hidden: Tensor, residual: Tensor, *, is_pair: bool, vector: int) -> None:
    """Read the states of `slots` into hidden and residual, `[n, H]`, last stride 1; arguments as for `store`.

    Of a state stored as a sum, hidden is the sum and residual is 0. The results may be parts of larger tensors, so
    that rows of several requests need not be concatenated.

    One launch, grid (n, P), and one that fills the residual for a sum; none for n = 0. Allocates nothing and never
    waits for the GPU. Raises ValueError as `store` does.
    """
    _check("load", parts, slots, hidden, residual)
    if hidden.shape[0] != slots.shape[0]:
        raise ValueError(f"load: {slots.shape[0]} slots into {tuple(hidden.shape)}")
    if not slots.shape[0]:
        return
    if not is_pair:
        residual.zero_()
    _load_kernel[(slots.shape[0], parts.shape[1])](
        parts, slots, hidden, residual, hidden.stride(0), residual.stride(0),
        HIDDEN=hidden.shape[1], VECTOR=vector, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def _check(name: str, parts: Tensor, slots: Tensor, hidden: Tensor, residual: Tensor) -> None:
    if hidden.shape != residual.shape or hidden.dtype != residual.dtype or hidden.ndim != 2:
        raise ValueError(f"{name}: hidden {tuple(hidden.shape)} {hidden.dtype}, residual {tuple(residual.shape)}")
    if hidden.stride(1) != 1 or residual.stride(1) != 1 or not slots.is_contiguous() or slots.dtype != torch.int64:
        raise ValueError(f"{name}: states need a last stride of 1, slots must be contiguous int64, not {slots.dtype}")
    if parts.dtype != torch.int64 or parts.ndim != 2 or parts.shape[0] != 4:
        raise ValueError(f"{name}: parts {tuple(parts.shape)} {parts.dtype}; make them with make_parts")


@triton.jit
def _part(parts, slots, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """This program's slot and part: pointer to the slot's row, first element of the state, elements."""
    part, count = tl.program_id(1), tl.num_programs(1)
    address = tl.load(parts + part)
    stride = tl.multiple_of(tl.load(parts + count + part), VECTOR)
    first = tl.multiple_of(tl.load(parts + 2 * count + part), VECTOR)
    size = tl.multiple_of(tl.load(parts + 3 * count + part), VECTOR)
    slot = tl.load(slots + tl.program_id(0))
    buffer = tl.multiple_of(address.to(tl.pointer_type(dtype)), VECTOR * (dtype.primitive_bitwidth // 8))
    return buffer + slot * stride, first, size


# Parts of a list of slots begin anywhere; they are read one by one.
@triton.jit(do_not_specialize_on_alignment=["slots", "rows"])
def _store_kernel(
    parts,
    slots,
    rows,
    hidden,
    residual,
    hidden_row,
    residual_row,
    HIDDEN: tl.constexpr,
    IS_PAIR: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of one slot's state."""
    dtype: tl.constexpr = hidden.dtype.element_ty
    target, first, size = _part(parts, slots, dtype, VECTOR)
    if HAS_ROWS:
        row = tl.load(rows + tl.program_id(0))
    else:
        row = tl.program_id(0).to(tl.int64)
    hidden += row * hidden_row
    residual += row * residual_row
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        column = first + at
        inside = at < size
        if IS_PAIR:
            # A part may hold the end of hidden and the start of residual.
            of_hidden = column < HIDDEN
            left = tl.load(hidden + column, mask=inside & of_hidden, other=0.0)
            right = tl.load(residual + (column - HIDDEN), mask=inside & (column >= HIDDEN), other=0.0)
            state = tl.where(of_hidden, left, right)
        else:
            left = tl.load(hidden + column, mask=inside, other=0.0).to(tl.float32)
            state = (left + tl.load(residual + column, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(target + at, state, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _load_kernel(
    parts,
    slots,
    hidden,
    residual,
    hidden_row,
    residual_row,
    HIDDEN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of one slot's state."""
    source, first, size = _part(parts, slots, hidden.dtype.element_ty, VECTOR)
    row = tl.program_id(0).to(tl.int64)
    hidden += row * hidden_row
    residual += row * residual_row
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        column = first + at
        state = tl.load(source + at, mask=at < size, other=0.0)
        tl.store(hidden + column, state, mask=(at < size) & (column < HIDDEN))
        tl.store(residual + (column - HIDDEN), state, mask=(at < size) & (column >= HIDDEN))
