"""KV rows as what they are made of: torch and the kernels move and gather bits, whatever type they stand for."""

from __future__ import annotations

import torch
from torch import Tensor


def as_bits(buffer: Tensor) -> Tensor:
    """The same memory, with 8-bit floats as bytes: torch does not gather or scatter these."""
    return buffer.view(torch.uint8) if buffer.element_size() == 1 else buffer


def move(buffer: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy the rows of slots `source` to slots `target` (int64 `[n]` each) in a K or V buffer."""
    bits = as_bits(buffer)
    bits.index_copy_(0, target, bits.index_select(0, source))


def gather(buffer: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of `slots` (any integers, `[n]`), of `dtype` where they are 8-bit floats."""
    rows = as_bits(buffer)[slots]
    return rows if rows.dtype == buffer.dtype else rows.view(buffer.dtype).to(dtype)
