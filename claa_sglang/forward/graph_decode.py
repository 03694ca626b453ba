"""Decoding through captured CUDA graphs: static buffers that say where late layers read and write.

One captured graph per batch size serves dense and pruned requests alike: late layers always run on the late child,
whose view points a dense request at its stock row and a pruned one at its late row. Boundary states of dense and padded
rows go to slot 0, which SGLang reserves for writes that nobody reads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from claa_sglang.forward.active_pass import ActivePass
from claa_sglang.forward.batch_plan import BatchPlan, Segment
from claa_sglang.forward.kept_rows import KeptView
from claa_sglang.forward.late_view import on_device


class DecodeBuffers:
    """Device tensors whose addresses captured graphs hold, for batches of up to `max_rows` requests.

    rows, lens, slots: int64 `[views, max_rows]`: table row, KV length and write slot at each late level, and at the end
        in early layers that read kept tokens, if there are such.
    boundary: int64 `[max_rows]`: slot whose late-layer rows take the boundary state.
    """

    def __init__(self, views: int, max_rows: int, device: torch.device) -> None:
        self.rows = torch.zeros(views, max_rows, dtype=torch.int64, device=device)
        self.lens = torch.ones_like(self.rows)
        self.slots = torch.zeros_like(self.rows)
        self.boundary = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def view(self, batch: Any, level: int) -> Any:
        """A copy of `batch` (a ForwardBatch at capture, SGLang's stand-in at replay) over these buffers. level: from 1;
        that of kept tokens comes after the last late one.

        Host lengths stay the batch's: upper bounds of the late ones, until `fill` of a plan replaces them.
        """
        count, late = batch.batch_size, level - 1
        view = copy.copy(batch)
        view.req_pool_indices = self.rows[late, :count]
        view.seq_lens = self.lens[late, :count]
        view.out_cache_loc = self.slots[late, :count]
        view.residual_stream = None
        return view

    def fill_dense(self, batch: Any) -> None:
        """Every request in the batch is dense, or the batch is a stand-in at capture: stock rows at every level."""
        count = batch.batch_size
        self.rows[:, :count] = batch.req_pool_indices
        self.lens[:, :count] = batch.seq_lens
        self.boundary[:count].zero_()

    def fill(self, batch: Any, plan: BatchPlan) -> list[Tensor]:
        """Rows and lengths of a batch with pruned requests; padded rows keep row 0 and the batch's fill length.

        Returns, per view, the lengths on the host: int64 `[batch size]`.
        """
        count = batch.batch_size
        padding = [1] * (count - len(plan.levels[0]))
        views: list[Sequence[Segment]] = list(plan.levels[1:])
        if len(views) < self.rows.shape[0]:
            views.append(plan.kept or plan.levels[0])
        lens = [[s.seq_len for s in view] + padding for view in views]
        rows = [[s.row for s in view] + [0] * len(padding) for view in views]
        pruned = [int(s.state is not None) for s in plan.levels[0]] + [0] * len(padding)
        packed = on_device([*rows, *lens, pruned], torch.int64, self.rows.device)
        self.rows[:, :count] = packed[: len(rows)]
        self.lens[:, :count] = packed[len(rows) : 2 * len(rows)]
        self.boundary[:count] = packed[-1]
        return [torch.tensor(view, dtype=torch.int64) for view in lens]

    def find_slots(self, table: Tensor, count: int, stock_slots: Tensor) -> None:
        """Write slots of this step, from the table rows; and the boundary slots of pruned rows.

        stock_slots: int64 `[n <= count]`, where early layers write; rows past it are padding.
        """
        # A row of length 0 (idle padding) would read the table's last column; nothing uses what it finds.
        self.slots[:, :count] = table[self.rows[:, :count], self.lens[:, :count] - 1]
        real = stock_slots.shape[0]
        self.boundary[:real] *= stock_slots
        self.boundary[real:count].zero_()


class DecodeGraphPass(ActivePass):
    """What the late layers' wrapper is given while a graph is captured: every row goes everywhere."""

    def __init__(self, views: list[Any], boundary_slots: Tensor, kept: KeptView | None) -> None:
        self.views = views  # the batch, then one view per late level
        self.kept = kept
        self._boundary_slots = boundary_slots

    @property
    def has_late_rows(self) -> bool:
        return True

    def needs_scores(self, level: int, layer_id: int) -> bool:
        """Decoding ranks nothing."""
        return False

    def score(self, level: int, queries: Tensor, key_buffer: Tensor, scaling: float) -> None:
        raise AssertionError("decoding ranks nothing")

    def boundary_rows(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(slots, hidden, residual) of every row."""
        return self._boundary_slots, hidden, residual

    def last_tokens(self) -> list[tuple[Tensor, Tensor]]:
        """None: decoding has no late prefill that goes on."""
        return []

    def cross(
        self, level: int, hidden: Tensor, residual: Tensor, positions: Tensor, boundary: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Every row goes on."""
        return hidden, residual, positions, self.views[level + 1]

    def merge_scores(self, level: int) -> None:
        """There are none."""

    def agree_on_failures(self, error: Exception | None) -> None:
        """An error of a capture is SGLang's to report, on each rank."""
        if error is not None:
            raise error

    def leave(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Every row is where it was."""
        return hidden, residual
