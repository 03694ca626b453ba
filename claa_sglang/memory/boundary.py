"""Boundary states: the residual stream after the first prune layer, one per token slot, kept across requests.

They live in the late-layer rows of the token's own KV slot, which a pruned request does not use otherwise: no extra
memory, and the state is shared, deduplicated and evicted together with the slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from claa_sglang.config.state_room import state_width


class BoundaryTooWide(ValueError):
    """The late-layer rows of one slot cannot hold a state exactly."""


class BoundaryStore:
    """Reads and writes boundary states in late-layer KV rows.

    The state is kept as the pair (hidden, residual) whose sum is the residual stream, so that nothing is rounded;
    if float32 rows are too narrow for the pair (few KV heads), as their sum, which is what layers make of it first.

    On a GPU one launch moves a state through all its buffers (`kernels/rows.py`); elsewhere one torch call per buffer.

    Args:
        buffers: K and V buffers of the late layers, each `[slots, heads, head_dim]`, contiguous.
        hidden_size: H, elements of one hidden state.
        dtype: dtype of the hidden states; the buffers', or these have 8 bits, which hold a part of an element each.

    Raises:
        BoundaryTooWide: the buffers hold too few elements per slot: 2 H in 16 bits, H in 32 (`state_room.py`).
        ValueError: the buffers have another dtype.
    """

    def __init__(self, buffers: Sequence[Tensor], hidden_size: int, dtype: torch.dtype) -> None:
        rows = [b.view(b.shape[0], -1) for b in buffers]
        if any(b.dtype != dtype and b.element_size() > 1 for b in rows):
            raise ValueError(f"KV buffers must have the model's dtype {dtype}, or 8 bits, to hold boundary states")
        if any(b.shape[1] * b.element_size() % dtype.itemsize for b in rows):
            raise ValueError(f"rows of {[b.shape[1] for b in rows]} elements hold a part of an element of {dtype}")
        rows = [b if b.dtype == dtype else b.view(dtype) for b in rows]
        width = sum(b.shape[1] for b in rows)
        if width < (needed := state_width(hidden_size, dtype.itemsize)):
            raise BoundaryTooWide(
                f"a slot's late-layer KV rows hold {width} elements, a boundary state has {needed}; "
                "prune earlier (--claa-prune-layer, --claa-schedule) or use fewer tensor-parallel ranks"
            )
        self.is_pair = width >= 2 * hidden_size
        self.hidden_size = hidden_size
        self._width = hidden_size * (2 if self.is_pair else 1)
        self._parts: list[tuple[Tensor, int, int]] = []  # (buffer, first element, elements)
        offset = 0
        for buffer in rows:
            if offset == self._width:
                break
            count = min(buffer.shape[1], self._width - offset)
            self._parts.append((buffer, offset, count))
            offset += count
        self._launch = None
        if rows[0].is_cuda:
            from claa_sglang.kernels.rows import make_parts

            self._launch = make_parts([part for part, _, _ in self._parts], [count for _, _, count in self._parts])

    def store(self, slots: Tensor, hidden: Tensor, residual: Tensor) -> None:
        """Write the states of `slots` (int64 `[n]`); hidden and residual are `[n, H]`."""
        if self._launch is not None:
            from claa_sglang.kernels import rows

            parts, vector = self._launch
            rows.store(parts, slots, hidden, residual, is_pair=self.is_pair, vector=vector)
            return
        state = torch.cat((hidden, residual), dim=1) if self.is_pair else hidden + residual
        for buffer, offset, count in self._parts:
            target = buffer if count == buffer.shape[1] else buffer[:, :count]
            target.index_copy_(0, slots, state[:, offset : offset + count])

    def load(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Read the states of `slots` (int64 `[n]`) as (hidden, residual), each `[n, H]`."""
        if self._launch is not None:
            from claa_sglang.kernels import rows

            parts, vector = self._launch
            hidden = torch.empty(slots.shape[0], self.hidden_size, dtype=self._parts[0][0].dtype, device=slots.device)
            residual = torch.empty_like(hidden)
            rows.load(parts, slots, hidden, residual, is_pair=self.is_pair, vector=vector)
            return hidden, residual
        state = torch.cat([buffer[:, :count].index_select(0, slots) for buffer, _, count in self._parts], dim=1)
        if self.is_pair:
            return state[:, : self.hidden_size].contiguous(), state[:, self.hidden_size :].contiguous()
        return state, torch.zeros_like(state)
