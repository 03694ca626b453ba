"""Late slots in any schedule: every slot has one owner, whatever requests do and in which order."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from claa_sglang.config.budget import kept_counts
from claa_sglang.memory.late_slots import OutOfLateSlots
from claa_sglang.patches.checks import free_slots
from claa_sglang.requests.state import RequestState
from tests.fast.memory.slots import RATES, ROWS, WIDTH, WINDOW, listed, make_pool, make_state, owned_twice

SCHEDULES = int(os.environ.get("CLAA_TEST_SCHEDULES", 100))  # `make test` asks for thousands


@dataclass
class Request:
    """The model's idea of one request: what its rows must list."""

    prompt: int
    state: RequestState | None  # None: dense
    generated: int = 0
    prefilled: bool = False
    length: int = 0  # tokens that have stock slots
    stock: list[int] = field(default_factory=list)  # of whole pages
    late: list[list[int]] = field(default_factory=list)  # of each late row that has its own, of whole pages
    aside: list[int] = field(default_factory=list)  # a page
    subset: list[int] = field(default_factory=list)  # second step: indices into the first step's kept slots
    borrowed: list[int] = field(default_factory=list)  # of a step of finishing: slots of the tree, in its late rows

    @property
    def target(self) -> int:
        """Length of the stock row once the prefill is complete."""
        return self.prompt + self.generated


class LateSlotsMachine(RuleBasedStateMachine):
    """Requests come, are prefilled in chunks and parts, decode, finish into a tree or are aborted at any time, are
    retracted and resume, and are flushed. Between them, steps of finishing borrow late slots."""

    @initialize(
        steps=st.integers(1, 2), size=st.integers(24, 70), need_sort=st.booleans(), page=st.sampled_from([1, 2, 4])
    )
    def start(self, steps: int, size: int, need_sort: bool, page: int) -> None:
        self.steps, self.size, self.page = steps, size // page * page, page
        self.pool, self.allocator, self.slots = make_pool(steps, self.size, need_sort, page)
        self.slots.evict = self.evict
        self.tree: list[int] = []  # cached pages, all of which may be evicted
        self.live: dict[int, Request] = {}
        self.waiting: list[Request] = []

    def evict(self, need: int) -> None:
        count = min(self.whole(max(0, need - self.allocator.available_size())), len(self.tree))
        gone, self.tree = self.tree[:count], self.tree[count:]
        self.allocator.free(torch.tensor(gone, dtype=torch.int64))

    def whole(self, tokens: int) -> int:
        """Slots of the pages that tokens take."""
        return -(-tokens // self.page) * self.page

    def grow(self, targets: dict[int, int]) -> bool:
        """What SGLang does for a batch: stock slots, then the auxiliary cache's; False when either runs out."""
        need = {row: self.whole(target) - len(self.live[row].stock) for row, target in targets.items()}
        self.evict(sum(need.values()))
        taken = self.allocator.alloc(sum(need.values()))
        if taken is None:
            return False
        free_before, late_before = self.allocator.available_size() + len(self.tree), self.slots.held
        table_before = self.slots.table.clone()
        # A step of finishing beside them has all it needs.
        lengths = targets | {row: r.prompt + r.generated for row, r in self.live.items() if r.borrowed}
        try:
            self.pool.alloc_aux_to_lengths(
                req_pool_indices_cpu=torch.tensor(list(lengths)),
                target_seq_lens_cpu=torch.tensor(list(lengths.values())),
            )
        except OutOfLateSlots:
            assert self.slots.held == late_before
            assert self.allocator.available_size() + len(self.tree) == free_before
            assert torch.equal(self.slots.table, table_before)
            self.allocator.free(taken)
            return False
        new = taken.tolist()
        for row, count in need.items():
            request = self.live[row]
            request.stock += new[:count]
            request.length = targets[row]
            del new[:count]
            self.note_late(row, request)
        return True

    def note_late(self, row: int, request: Request) -> None:
        """A row lists what it did before, then new slots; how many is known from lengths alone."""
        if request.state is None or request.borrowed:
            return
        generated = max(request.generated, request.length - request.prompt)
        counts = request.state.plan.kept_counts[: 1 if self.page == 1 else None]
        now = [listed(self.slots, row, i, self.whole(n + generated)) for i, n in enumerate(counts, start=1)]
        assert all(a[: len(b)] == b for a, b in zip(now, request.late, strict=False))
        request.late = now
        for slots in now:  # pages as they were handed out
            assert all(a + 1 == b for i, (a, b) in enumerate(pairwise(slots), start=1) if i % self.page)
            assert all(slot % self.page == 0 for slot in slots[:: self.page])

    # --- rules ---

    @precondition(lambda self: len(self.live) < ROWS)
    @rule(prompt=st.integers(1, 16), dense=st.booleans(), rates=st.sampled_from([RATES, (1.0, 0.5), (0.01, 0.001)]))
    def admit(self, prompt: int, dense: bool, rates: tuple[float, ...]) -> None:
        counts = kept_counts(prompt, rates[: self.steps], WINDOW)
        self.place(Request(prompt, None if dense else make_state(prompt, counts)))

    def place(self, request: Request) -> None:
        (row,) = self.pool.alloc_rows(1)
        assert row not in self.live
        self.live[row] = request
        if request.state is not None:
            self.slots.bind(row, request.state, request.generated)
        assert not self.slots.reserved(row)

    @precondition(lambda self: self.tree and len(self.live) < ROWS)
    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        """A step of finishing: its late rows list slots that the tree has, and keeps."""
        pages = data.draw(st.lists(st.sampled_from(self.tree[:: self.page]), min_size=1, max_size=4, unique=True))
        slots = [page + i for page in pages for i in range(self.page)]
        state = make_state(len(slots), (len(slots),) * self.steps)
        state.progress.borrowed = torch.tensor(slots)
        self.place(Request(len(slots), state, prefilled=True, borrowed=slots))

    def some(self, data: st.DataObject, prefilled: bool) -> list[int]:
        rows = [row for row, request in self.live.items() if request.prefilled == prefilled and not request.borrowed]
        return data.draw(st.lists(st.sampled_from(rows), unique=True, min_size=1)) if rows else []

    @rule(data=st.data())
    def chunk(self, data: st.DataObject) -> None:
        targets = {}
        for row in self.some(data, prefilled=False):
            done = self.live[row].length
            targets[row] = data.draw(st.integers(done + 1, self.live[row].target))
            if (state := self.live[row].state) is not None:
                self.slots.bind(row, state, self.live[row].generated)  # stock asks again at every chunk
        if not targets or not self.grow(targets):
            return
        for row, length in targets.items():
            request = self.live[row]
            assert self.slots.reserved(row) == (request.state is not None)
            request.prefilled = length == request.target
            if request.prefilled and request.state is not None and self.steps == 2 and self.page == 1:
                first, second = request.state.plan.kept_counts
                request.subset = sorted(data.draw(st.permutations(range(first)))[:second])
                base = self.slots.stride + row
                # What the second prune does in the forward.
                self.slots.table[base + self.slots.stride, :second] = self.slots.table[base, request.subset]

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        rows = [r for r in self.some(data, prefilled=True) if self.live[r].target < WIDTH]
        foreseen, before = sum(self.slots.need_of_next_token(row) for row in rows), self.slots.held
        if rows and self.grow({row: self.live[row].target + 1 for row in rows}):
            # By this decoding retracts in time. What a retraction reserved is not used up yet.
            assert self.slots.held - before <= foreseen
            assert self.slots.held - before == foreseen or any(self.live[row].generated for row in rows)
            for row in rows:
                self.live[row].generated += 1

    @rule(data=st.data())
    def withhold_last_page(self, data: st.DataObject) -> None:
        """The late prefill goes on in another step, where the last page is a new one; the old one is read there."""
        rows = [r for r in self.some(data, prefilled=True) if self.live[r].state is not None and self.steps == 1]
        for row in rows:
            request = self.live[row]
            if request.generated and request.length > request.prompt:
                continue  # it decodes
            last = (request.length - 1) // self.page * self.page
            request.stock, request.aside = request.stock[:last], request.stock[last:]
            self.slots.set_aside(row, torch.tensor(request.aside[: request.length - last]))
            request.prefilled, request.length = False, last

    def release(self, row: int) -> Request:
        self.pool.free_rows([row])
        return self.live.pop(row)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), cached=st.booleans())
    def finish_or_abort(self, data: st.DataObject, cached: bool) -> None:
        request = self.release(data.draw(st.sampled_from(sorted(self.live))))
        full = request.length // self.page * self.page if cached else 0
        self.tree += request.stock[:full]
        self.allocator.free(torch.tensor(request.stock[full:], dtype=torch.int64))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        request = self.release(data.draw(st.sampled_from(sorted(self.live))))
        if request.borrowed:
            return
        self.allocator.free(torch.tensor(request.stock, dtype=torch.int64))
        self.waiting.append(Request(request.prompt, request.state, request.generated))

    @precondition(lambda self: self.waiting and len(self.live) < ROWS)
    @rule()
    def resume(self) -> None:
        self.place(self.waiting.pop(0))

    @rule()
    def flush(self) -> None:
        """`/flush_cache`: the table is cleared, then the allocator; the tree goes with them."""
        self.pool.clear()
        self.pool.reset_aux_cache_allocator()
        self.allocator.clear()
        self.live, self.tree = {}, []

    # --- what must always be true ---

    @invariant()
    def conserved(self) -> None:
        late = sum(len(slots) for r in self.live.values() for slots in (*r.late, r.aside))
        stock = sum(len(r.stock) for r in self.live.values())
        assert self.slots.held == late
        assert self.slots.free_count == self.allocator.available_size()
        assert self.slots.free_count + late + stock + len(self.tree) == self.slots.total == self.slots.dense_capacity

    @invariant()
    def one_owner_each(self) -> None:
        owned = [s for r in self.live.values() for slots in (r.stock, *r.late, r.aside) for s in slots] + self.tree
        owned += free_slots(self.allocator).tolist()
        assert sorted(owned) == list(range(self.page, self.size + self.page))
        assert owned_twice(self.allocator, self.slots) == []

    @invariant()
    def rows_list_what_is_held(self) -> None:
        for row, request in self.live.items():
            for level in range(1, self.steps + 1):
                assert listed(self.slots, row, level, len(request.borrowed)) == request.borrowed
            assert not (request.borrowed and self.slots.reserved(row))
            for level, slots in enumerate(request.late, start=1):
                assert listed(self.slots, row, level, len(slots)) == slots
            if request.state is None or self.steps == 1 or not request.late or self.page > 1:
                continue
            first, second = request.state.plan.kept_counts
            (slots,) = request.late
            generated = slots[first:]
            assert listed(self.slots, row, 2, second + len(generated))[second:] == generated
            if request.prefilled:
                assert listed(self.slots, row, 2, second) == [slots[i] for i in request.subset]

    def teardown(self) -> None:
        if hasattr(self, "live"):
            for row in list(self.live):
                self.release(row)
            assert self.slots.held == 0


TestSchedules = LateSlotsMachine.TestCase
TestSchedules.settings = settings(
    max_examples=SCHEDULES, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
