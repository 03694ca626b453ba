"""Late slots: KV slots private to one pruned request, taken from the stock allocator, freed with its table row.

The object is an *auxiliary cache* of SGLang's request table (`ReqToTokenPool.attach_aux_cache`), so stock code calls
`alloc_to_lengths`, `free`, `clear` and `reset_allocator` at the moments at which it handles the stock slots
themselves. All bookkeeping is on the host; slot numbers stay on the device.

One table, several kinds of row: the request table is one tensor whose first `stride` rows are stock's own; row
`level * stride + r` lists the late slots of the request in stock row r after prune step `level`. Which of them have
slots of their own is said in `pages.py`. Rows after these, if there are any, list early slots (`kept_rows.py`). A row
may list slots past its end, up to the end of its last page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from claa_sglang.memory.pages import Pages
from claa_sglang.requests.state import RequestState


class SlotAllocator(Protocol):
    """What is used of SGLang's token-to-KV-pool allocators."""

    size: int
    page_size: int

    def available_size(self) -> int: ...
    def alloc(self, need_size: int) -> Tensor | None: ...
    def free_page_ids(self, page_ids: Tensor) -> None: ...


class OutOfLateSlots(RuntimeError):
    """The pool has no slot for the late layers; admission and retraction exist to keep this from happening."""


@dataclass(slots=True)
class _Owner:
    state: RequestState
    behind: int  # tokens after the kept ones that the rows list, or will with the first slots
    room: int = -1  # tokens after the kept ones for which there are slots; -1 before the first ones
    held: list[int] = field(default_factory=list)  # slots of each row that has its own
    aside: Tensor | None = None  # more slots, not listed in the table: see `set_aside`


class _Growth(NamedTuple):
    """A request whose rows are to list so many tokens after the kept ones, with so many slots each, `need` of them
    new."""

    row: int
    owner: _Owner
    behind: int
    targets: list[int]
    need: int


class LateSlots:
    """Owns every late slot.

    Args:
        table: int32 `[(steps + 1) * stride, max_context_len]`, the widened request table.
        stride: rows of the stock request table.
        allocator: SGLang's slot allocator.
        evict: called with a number of slots before they are allocated; frees prefix-cache entries if need be.
        steps: prune steps; None where the table has late rows alone beside stock's.
    """

    def __init__(
        self,
        table: Tensor,
        stride: int,
        allocator: SlotAllocator,
        evict: Callable[[int], object],
        steps: int | None = None,
    ) -> None:
        if table.shape[0] % stride:
            raise ValueError(f"table has {table.shape[0]} rows, not a multiple of the stock table's {stride}")
        self.table = table
        self.stride = stride
        self.num_steps = table.shape[0] // stride - 1 if steps is None else steps
        self.pages = Pages(allocator.page_size)
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
        return sum(sum(one.held) + self.pages.size * (one.aside is not None) for one in self._owners.values())

    def reserved(self, row: int | None) -> bool:
        """Whether the request in stock row `row` has its prompt's late slots already."""
        return row is not None and row in self._owners and any(self._owners[row].held)

    def need_of_next_token(self, row: int) -> int:
        """Late slots to be taken for one more generated token of the request in stock row `row`."""
        if (owner := self._owners.get(row)) is None:
            return 0
        return sum(self.pages.late_slots(owner.state, owner.behind + 1)) - sum(owner.held)

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
            # A retracted request brings what it had generated as part of its prefill.
            self._owners[row] = _Owner(state, generated, held=[0] * self.pages.late_rows(state))
            if (slots := state.progress.borrowed) is not None:
                rows = self.table[self.stride + row :: self.stride][: self.num_steps]
                rows[:, : len(slots)] = slots.to(torch.int32)
        elif owner.state is not state:
            raise ValueError(f"row {row} is still bound to another request")

    def alloc_to_lengths(self, *, req_pool_indices_cpu: Tensor, target_seq_lens_cpu: Tensor) -> None:
        """Take the late slots that rows of these stock lengths need. Called by SGLang for prefill and decode.

        The first call for a row takes every slot its prompt can need, before any of its chunks has run, so a prompt
        that was started can be finished. Later calls take a slot per generated token, or the page it begins. Rows that
        are not bound (dense requests) are left alone.

        Raises:
            OutOfLateSlots: nothing was taken for any row.
        """
        grows: list[_Growth] = []
        shared = self.pages.are_shared
        for row, seq_len in zip(req_pool_indices_cpu.tolist(), target_seq_lens_cpu.tolist(), strict=True):
            if (owner := self._owners.get(row)) is None or owner.state.progress.borrowed is not None:
                continue
            behind = max(owner.behind, seq_len - owner.state.plan.prompt_tokens)
            if behind <= owner.room:
                owner.behind = behind
                continue
            # With pages of one token that is every row of every decode step.
            kept = owner.state.plan.kept_counts
            targets = [kept[0] + behind] if shared else self.pages.late_slots(owner.state, behind)
            grows.append(_Growth(row, owner, behind, targets, sum(targets) - sum(owner.held)))
        if not grows:
            return
        need = sum(growth.need for growth in grows)
        self.evict(need)
        slots = self._allocator.alloc(need)
        if slots is None:
            raise OutOfLateSlots(f"late layers need {need} KV slots, {self.free_count} are free")
        self._append(grows, slots.to(torch.int32))
        for _, owner, behind, targets, _ in grows:
            owner.behind = owner.room = behind
            owner.held = targets
            if not shared:
                kept = owner.state.plan.kept_counts
                owner.room = min(held - count for held, count in zip(targets, kept, strict=True))

    def _append(self, grows: list[_Growth], slots: Tensor) -> None:
        """List new slots (int32 `[n]`) in the rows of those who grow, in their order."""
        if not self.pages.are_shared:
            self._append_pages(grows, slots)
        elif all(growth.need == 1 for growth in grows):
            self._append_one(grows, slots)
        else:
            self._append_many(grows, slots)

    def _append_pages(self, grows: list[_Growth], slots: Tensor) -> None:
        """Whole pages, to each step's row its own."""
        width, offset = self.table.shape[1], 0
        for growth in grows:
            for level, (held, target) in enumerate(zip(growth.owner.held, growth.targets, strict=True), start=1):
                taken = slots[offset : offset + target - held]
                offset += target - held
                # The end of a last page may lie behind the longest request.
                self.table[level * self.stride + growth.row, held:target] = taken[: max(0, width - held)]

    def _append_one(self, grows: list[_Growth], slots: Tensor) -> None:
        """One generated token each: a single scatter for the whole decode batch, at every step's row."""
        rows, columns, values = [], [], []
        for i, growth in enumerate(grows):
            for step, kept in enumerate(growth.owner.state.plan.kept_counts):
                rows.append((step + 1) * self.stride + growth.row)
                columns.append(kept + growth.behind - 1)
                values.append(i)
        index = torch.tensor([rows, columns, values], pin_memory=self.table.is_cuda)
        rows_d, columns_d, values_d = index.to(self.table.device, non_blocking=True)
        self.table[rows_d, columns_d] = slots[values_d]

    def _append_many(self, grows: list[_Growth], slots: Tensor) -> None:
        offset = 0
        for growth in grows:
            (before,), (target,) = growth.owner.held, growth.targets
            taken = slots[offset : offset + target - before]
            offset += target - before
            self.table[self.stride + growth.row, before:target] = taken
            # A later step's row lists kept slots chosen on the device, then the generated tokens' slots, known here.
            first, *later = growth.owner.state.plan.kept_counts
            for step, kept in enumerate(later, start=2):
                start = max(before, first)
                if target > start:
                    self.table[step * self.stride + growth.row, kept + start - first : kept + target - first] = taken[
                        start - before :
                    ]

    def set_aside(self, row: int, slots: Tensor) -> None:
        """Take over a page of the request in stock row `row`, which stock is to forget but the next forward reads.

        slots: int64 `[n]`, the page's first. The page set aside before goes back: the forward that read it was
        launched, and whoever takes it writes to it in a later one.
        """
        owner = self._owners[row]
        self._give_back(owner.aside)
        owner.aside = owner.state.progress.last_slots = slots

    def free(self, row: int) -> None:
        """Give back what the request in stock row `row` holds. A row that is not bound is fine."""
        owner = self._owners.pop(row, None)
        if owner is None:
            return
        owner.state.progress.reset_scheduling()
        self._give_back(owner.aside)
        for slots in self._listed(row, owner):
            self._give_back(slots)

    def _listed(self, row: int, owner: _Owner) -> list[Tensor]:
        """Slots of each row that has its own: int64, the end of a last page left out where the table ends before."""
        rows = self.table[self.stride + row :: self.stride]
        return [line[:held].to(torch.int64) for line, held in zip(rows, owner.held, strict=False) if held]

    def _give_back(self, slots: Tensor | None) -> None:
        """Free the pages of `slots` (int64 `[n]`), which follow each other in them, from the start of one."""
        if slots is not None:
            self._allocator.free_page_ids(slots[:: self.pages.size] // self.pages.size)

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
            slots = self._listed(row, owner)
            if owner.aside is not None:
                slots.append(owner.aside)
            if slots:
                found.append((row, torch.cat(slots)))
        return found
