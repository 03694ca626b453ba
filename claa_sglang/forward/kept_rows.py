"""Rows of the request table that generated tokens read in early layers, where they read kept prompt tokens alone.

Such a row lists the *early* slots of the prompt tokens that the first prune kept, then those of the tokens generated
since. It owns nothing: the slots are those of the request's stock row, and their KV stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claa_sglang.forward.batch_plan import BatchPlan, KeptSegment
from claa_sglang.forward.late_view import make_view, on_device


@dataclass(frozen=True)
class KeptView:
    """What the restricted layers of one forward read.

    Attributes:
        batch: the view, a copy of SGLang's ForwardBatch.
        rows: int64 `[n]`, which rows of level 0 it is of; None in decode, where it is all of them.
    """

    batch: Any
    rows: Tensor | None = None

    @classmethod
    def of(cls, plan: BatchPlan, batch: Any, table: Tensor, checked: bool) -> KeptView:
        """The view of a forward whose plan has `kept`. Completes the rows that it reads.

        batch: SGLang's ForwardBatch of the early layers. table, checked: as for `list_kept`.
        """
        list_kept(plan, table, batch.out_cache_loc, checked)
        view = make_view(batch, plan.kept, table, decode=plan.decode)
        if plan.decode:
            return cls(view)
        sources = [segment.source + i for segment in plan.kept for i in range(segment.rows)]
        (rows,) = on_device([sources], torch.int64, table.device)
        view.positions = batch.positions[rows]
        return cls(view, rows)


def list_kept(plan: BatchPlan, table: Tensor, slots: Tensor, checked: bool) -> None:
    """Complete the rows of `plan.kept`, before anything reads them.

    Args:
        table: the widened request table, int32 `[rows, max_context_len]`; its stock rows list this forward's slots.
        slots: int64 `[rows of level 0]`, where this forward's tokens keep their early KV.
        checked: whether each row is compared with its stock row, which waits for the device.

    Raises AssertionError where they are compared and differ: slots of somebody else would be read.
    """
    current = []
    for segment in plan.kept:
        stock = plan.levels[0][segment.request].row
        if segment.state is None or segment.row == stock:
            continue
        if not segment.stale:
            current.append(segment)
            continue
        # Of a request that failed before it was ranked nobody reads the answer, and the row stays as it is.
        if (kept := segment.state.progress.kept[0]) is not None:
            table[segment.row, : segment.seq_len] = _listed(segment, stock, kept, table)
    if current:  # one new token each
        places = [[s.row for s in current], [s.prefix_len for s in current], [s.source for s in current]]
        rows, columns, sources = on_device(places, torch.int64, table.device)
        table[rows, columns] = slots[sources].to(table.dtype)
    for segment in current if checked else ():
        _compare(segment, plan.levels[0][segment.request].row, table)


def _compare(segment: KeptSegment, stock: int, table: Tensor) -> None:
    assert segment.state is not None
    if (kept := segment.state.progress.kept[0]) is not None:
        assert torch.equal(table[segment.row, : segment.seq_len], _listed(segment, stock, kept, table)), (
            f"CLAA: row {segment.row} of kept tokens lists other slots than its request has"
        )


def _listed(segment: KeptSegment, stock: int, kept: Tensor, table: Tensor) -> Tensor:
    """What the row is to list: int32 `[seq_len]`. kept: int64 `[n]`, the prompt positions. stock: the stock row."""
    assert segment.state is not None
    first = segment.state.plan.prompt_tokens
    return torch.cat((table[stock, kept], table[stock, first : first + segment.seq_len - kept.shape[0]]))
