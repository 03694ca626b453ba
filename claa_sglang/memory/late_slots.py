"""Late slots: KV slots private to one pruned request, taken from the stock allocator, freed with its table row.

The object is an *auxiliary cache* of SGLang's request table (`ReqToTokenPool.attach_aux_cache`), so stock code calls
`alloc_to_lengths`, `free`, `clear` and `reset_allocator` at the moments at which it handles the stock slots
themselves. All bookkeeping is on the host; slot numbers stay on the device.

One table, several kinds of row: the request table is one tensor whose first `stride` rows are stock's own; row
`level * stride + r` lists the late slots of the request in stock row r after prune step `level`. A later step's row
lists a subset of the first step's slots, so it owns none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from claa_sglang.requests.state import RequestState


class SlotAllocator(Protocol):
    """What is used of SGLang's token-to-KV-pool allocator (page size 1)."""

    size: int

    def available_size(self) -> int: ...
    def alloc(self, need_size: int) -> Tensor | None: ...
    def free(self, free_index: Tensor) -> None: ...


class OutOfLateSlots(RuntimeError):
    """The pool has no slot for the late layers; admission and retraction exist to keep this from happening."""


@dataclass(slots=True)
class _Owner:
    state: RequestState
    generated: int  # tokens generated before the row was taken: a retracted request brings them as part of its prefill
    held: int = 0
    aside: Tensor | None = None  # one more slot, not listed in the table: see `set_aside`


class LateSlots:
    """Owns every late slot.

    Args:
        table: int32 `[(steps + 1) * stride, max_context_len]`, the widened request table.
        stride: rows of the stock request table.
        allocator: SGLang's slot allocator.
        evict: called with a number of slots before they are allocated; frees prefix-cache entries if need be.
    """

    def __init__(self, table: Tensor, stride: int, allocator: SlotAllocator, evict: Callable[[int], object]) -> None:
        if table.shape[0] % stride:
            raise ValueError(f"table has {table.shape[0]} rows, not a multiple of the stock table's {stride}")
        self.table = table
        self.stride = stride
        self.num_steps = table.shape[0] // stride - 1
        self.evict = evict
        self._allocator = allocator
        self._owners: dict[int, _Owner] = {}

    # --- numbers -------------------------------------------------------------------------------------------------

    @property
    def dense_capacity(self) -> int:
        """Slots the scheduler may plan with: all of them, as late slots come from the same pool."""
        return self._allocator.size

    @property
    def total(self) -> int:
        """Slots of the shared pool; early KV, cached prefixes and late KV compete for them."""
        return self._allocator.size

    @property
    def free_count(self) -> int:
        """Slots that can be taken at once, before evicting anything."""
        return self._allocator.available_size()

    @property
    def held(self) -> int:
        """Late slots owned by requests now; 0 when the server is idle."""
        return sum(owner.held + (owner.aside is not None) for owner in self._owners.values())

    def reserved(self, row: int | None) -> bool:
        """Whether the request in stock row `row` has its prompt's late slots already."""
        return row is not None and row in self._owners and self._owners[row].held > 0

    # --- life of a row -------------------------------------------------------------------------------------------

    def bind(self, row: int, state: RequestState, generated: int) -> None:
        """Declare the pruned request that has just taken stock row `row`. Binding it again does nothing.

        One with borrowed slots has all it needs: they are listed in its late rows now, and stay its lender's.

        Args:
            generated: tokens of the prefill that were generated before a retraction; their late slots are reserved
                together with the prompt's.

        Raises:
            ValueError: the row belongs to another request, which was never freed.
        """
        owner = self._owners.get(row)
        if owner is None:
            self._owners[row] = _Owner(state, generated)
            if (slots := state.progress.borrowed) is not None:
                rows = self.table[self.stride + row :: self.stride]
                rows[:, : len(slots)] = slots.to(torch.int32)
        elif owner.state is not state:
            raise ValueError(f"row {row} is still bound to another request")

    def alloc_to_lengths(self, *, req_pool_indices_cpu: Tensor, target_seq_lens_cpu: Tensor) -> None:
        """Take the late slots that rows of these stock lengths need. Called by SGLang for prefill and decode.

        The first call for a row takes every slot its prompt can need, before any of its chunks has run, so a prompt
        that was started can be finished. Later calls take one slot per generated token. Rows that are not bound
        (dense requests) are left alone.

        Raises:
            OutOfLateSlots: nothing was taken for any row.
        """
        grows: list[tuple[int, _Owner, int]] = []
        for row, seq_len in zip(req_pool_indices_cpu.tolist(), target_seq_lens_cpu.tolist(), strict=True):
            if (owner := self._owners.get(row)) is None or owner.state.progress.borrowed is not None:
                continue
            plan = owner.state.plan
            target = plan.kept_counts[0] + max(owner.generated, seq_len - plan.prompt_tokens)
            if target > owner.held:
                grows.append((row, owner, target))
        need = sum(target - owner.held for _, owner, target in grows)
        if need == 0:
            return
        self.evict(need)
        slots = self._allocator.alloc(need)
        if slots is None:
            raise OutOfLateSlots(f"late layers need {need} KV slots, {self.free_count} are free")
        if all(target == owner.held + 1 for _, owner, target in grows):
            self._append_one(grows, slots)
        else:
            self._append_many(grows, slots)

    def _append_one(self, grows: list[tuple[int, _Owner, int]], slots: Tensor) -> None:
        """One generated token each: a single scatter for the whole decode batch, at every step's row."""
        rows, columns, values = [], [], []
        for i, (row, owner, target) in enumerate(grows):
            owner.held = target
            behind = target - owner.state.plan.kept_counts[0]
            for step, kept in enumerate(owner.state.plan.kept_counts):
                rows.append((step + 1) * self.stride + row)
                columns.append(kept + behind - 1)
                values.append(i)
        index = torch.tensor([rows, columns, values], pin_memory=self.table.is_cuda)
        rows_d, columns_d, values_d = index.to(self.table.device, non_blocking=True)
        self.table[rows_d, columns_d] = slots[values_d].to(torch.int32)

    def _append_many(self, grows: list[tuple[int, _Owner, int]], slots: Tensor) -> None:
        offset = 0
        for row, owner, target in grows:
            taken = slots[offset : offset + target - owner.held].to(torch.int32)
            offset += target - owner.held
            self.table[self.stride + row, owner.held : target] = taken
            # A later step's row lists kept slots chosen on the device, then the generated tokens' slots, known here.
            first, before = owner.state.plan.kept_counts[0], owner.held
            for step, kept in enumerate(owner.state.plan.kept_counts[1:], start=2):
                start = max(before, first)
                if target > start:
                    self.table[step * self.stride + row, kept + start - first : kept + target - first] = taken[
                        start - before :
                    ]
            owner.held = target

    def set_aside(self, row: int, slot: Tensor) -> None:
        """Take over a slot of the request in stock row `row`, which stock is to forget but the next forward reads.

        slot: int64 `[1]`. The one set aside before goes back: the forward that read it was launched, and whoever takes
        the slot writes to it in a later one.
        """
        owner = self._owners[row]
        if owner.aside is not None:
            self._allocator.free(owner.aside)
        owner.aside = owner.state.progress.last_slot = slot

    def free(self, row: int) -> None:
        """Give back what the request in stock row `row` holds. A row that is not bound is fine."""
        owner = self._owners.pop(row, None)
        if owner is None:
            return
        owner.state.progress.reset_scheduling()
        if owner.aside is not None:
            self._allocator.free(owner.aside)
        if owner.held:
            self._allocator.free(self.table[self.stride + row, : owner.held].to(torch.int64))

    def clear(self) -> None:
        """Forget every owner; the caller clears the allocator itself (`/flush_cache`)."""
        self._owners.clear()

    def reset_allocator(self) -> None:
        """Nothing to reserve: late slots are taken when a request needs them."""

    # --- checks --------------------------------------------------------------------------------------------------

    def holdings(self) -> list[tuple[int, Tensor]]:
        """(stock row, its late slots: int64) of every request that holds some. Reads the table: for checks."""
        found = []
        for row, owner in self._owners.items():
            slots = self.table[self.stride + row, : owner.held].to(torch.int64)
            if owner.held:
                found.append((row, slots if owner.aside is None else torch.cat((slots, owner.aside))))
        return found
