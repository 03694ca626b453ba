"""Late slots on SGLang's own allocator and request table: whatever the schedule, every slot has one owner."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from claa_sglang.config.budget import kept_counts
from claa_sglang.config.config import PruneStep
from claa_sglang.memory.census import Owned, SlotCensus
from claa_sglang.memory.late_slots import LateSlots, OutOfLateSlots
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import Progress, RequestPlan, RequestState

ROWS, WIDTH, WINDOW, RATES = 4, 48, 2, (0.5, 0.2)
SCHEDULES = int(os.environ.get("CLAA_TEST_SCHEDULES", 100))  # `make test` asks for thousands


def make_state(prompt: int, counts: tuple[int, ...]) -> RequestState:
    steps = tuple(PruneStep(prune_layer=i, keep_rate=RATES[i], score_layers=(i,)) for i in range(len(counts)))
    return RequestState(RequestPlan(RequestOptions(), prompt, steps, counts), Progress.before_any(len(counts)))


def make_pool(steps: int, size: int, need_sort: bool = False):
    """(request table, allocator, late slots) wired as in the server: the late slots are the table's auxiliary cache."""
    allocator = TokenToKVPoolAllocator(size, torch.int64, "cpu", None, need_sort)
    pool = ReqToTokenPool(ROWS, WIDTH, "cpu", False)
    stride = pool.req_to_token.shape[0]
    # Nonsense in unwritten entries, so that reading one shows.
    table = torch.full(((steps + 1) * stride, WIDTH), -1, dtype=torch.int32)
    pool.req_to_token = table[:stride]
    slots = LateSlots(table, stride, allocator, evict=lambda _: None)
    pool.attach_aux_cache(slots)
    return pool, allocator, slots


def extend(slots: LateSlots, lengths: dict[int, int]) -> None:
    slots.alloc_to_lengths(
        req_pool_indices_cpu=torch.tensor(list(lengths), dtype=torch.int64),
        target_seq_lens_cpu=torch.tensor(list(lengths.values()), dtype=torch.int64),
    )


def listed(slots: LateSlots, row: int, level: int, count: int) -> list[int]:
    return slots.table[level * slots.stride + row, :count].tolist()


def owned_twice(allocator: TokenToKVPoolAllocator, slots: LateSlots) -> list[str]:
    late = [Owned(f"row {row}", held) for row, held in slots.holdings()]
    return SlotCensus(allocator.size, "cpu").shared([Owned("free", allocator.get_all_free_pages()), *late])


# --- any schedule ----------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """The model's idea of one request: what its rows must list."""

    prompt: int
    state: RequestState | None  # None: dense
    generated: int = 0
    prefilled: bool = False
    stock: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    aside: list[int] = field(default_factory=list)
    subset: list[int] = field(default_factory=list)  # second step: indices into the first step's kept slots
    borrowed: list[int] = field(default_factory=list)  # of a step of finishing: slots of the tree, in its late rows

    @property
    def target(self) -> int:
        """Length of the stock row once the prefill is complete."""
        return self.prompt + self.generated


class LateSlotsMachine(RuleBasedStateMachine):
    """Requests come, are prefilled in chunks and parts, decode, finish into a tree or are aborted at any time, are
    retracted and resume, and are flushed. Between them, steps of finishing borrow late slots."""

    @initialize(steps=st.integers(1, 2), size=st.integers(24, 70), need_sort=st.booleans())
    def start(self, steps: int, size: int, need_sort: bool) -> None:
        self.steps, self.size = steps, size
        self.pool, self.allocator, self.slots = make_pool(steps, size, need_sort)
        self.slots.evict = self.evict
        self.tree: list[int] = []  # cached slots, all of which may be evicted
        self.live: dict[int, Request] = {}
        self.waiting: list[Request] = []

    def evict(self, need: int) -> None:
        count = min(max(0, need - self.allocator.available_size()), len(self.tree))
        gone, self.tree = self.tree[:count], self.tree[count:]
        self.allocator.free(torch.tensor(gone, dtype=torch.int64))

    def grow(self, targets: dict[int, int]) -> bool:
        """What SGLang does for a batch: stock slots, then the auxiliary cache's; False when either runs out."""
        need = {row: target - len(self.live[row].stock) for row, target in targets.items()}
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
            del new[:count]
            self.note_late(row, request)
        return True

    def note_late(self, row: int, request: Request) -> None:
        """The row lists what it did before, then new slots; how many is known from lengths alone."""
        if request.state is None or request.borrowed:
            return
        generated = max(request.generated, len(request.stock) - request.prompt)
        now = listed(self.slots, row, 1, request.state.plan.kept_counts[0] + generated)
        assert now[: len(request.late)] == request.late
        request.late = now

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
        slots = data.draw(st.lists(st.sampled_from(self.tree), min_size=1, max_size=16, unique=True))
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
            done = len(self.live[row].stock)
            targets[row] = data.draw(st.integers(done + 1, self.live[row].target))
            if (state := self.live[row].state) is not None:
                self.slots.bind(row, state, self.live[row].generated)  # stock asks again at every chunk
        if not targets or not self.grow(targets):
            return
        for row, length in targets.items():
            request = self.live[row]
            assert self.slots.reserved(row) == (request.state is not None)
            request.prefilled = length == request.target
            if request.prefilled and request.state is not None and self.steps == 2:
                first, second = request.state.plan.kept_counts
                request.subset = sorted(data.draw(st.permutations(range(first)))[:second])
                base = self.slots.stride + row
                # What the second prune does in the forward.
                self.slots.table[base + self.slots.stride, :second] = self.slots.table[base, request.subset]

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        rows = [r for r in self.some(data, prefilled=True) if self.live[r].target < WIDTH]
        if rows and self.grow({row: self.live[row].target + 1 for row in rows}):
            for row in rows:
                self.live[row].generated += 1

    @rule(data=st.data())
    def withhold_last_token(self, data: st.DataObject) -> None:
        """The late prefill goes on in another step, where the last token gets a new slot; the old one is read there."""
        rows = [r for r in self.some(data, prefilled=True) if self.live[r].state is not None and self.steps == 1]
        for row in rows:
            request = self.live[row]
            if request.generated and len(request.stock) > request.prompt:
                continue  # it decodes
            request.aside = [request.stock.pop()]
            self.slots.set_aside(row, torch.tensor(request.aside))
            request.prefilled = False

    def release(self, row: int) -> Request:
        self.pool.free_rows([row])
        return self.live.pop(row)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), cached=st.booleans())
    def finish_or_abort(self, data: st.DataObject, cached: bool) -> None:
        request = self.release(data.draw(st.sampled_from(sorted(self.live))))
        if cached:
            self.tree += request.stock
        else:
            self.allocator.free(torch.tensor(request.stock, dtype=torch.int64))

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
        late = sum(len(r.late) + len(r.aside) for r in self.live.values())
        stock = sum(len(r.stock) for r in self.live.values())
        assert self.slots.held == late
        assert self.slots.free_count == self.allocator.available_size()
        assert self.slots.free_count + late + stock + len(self.tree) == self.slots.total == self.slots.dense_capacity

    @invariant()
    def one_owner_each(self) -> None:
        owned = [s for r in self.live.values() for s in r.stock + r.late + r.aside] + self.tree
        owned += self.allocator.get_all_free_pages().tolist()
        assert sorted(owned) == list(range(1, self.size + 1))
        assert owned_twice(self.allocator, self.slots) == []

    @invariant()
    def rows_list_what_is_held(self) -> None:
        for row, request in self.live.items():
            for level in range(1, self.steps + 1):
                assert listed(self.slots, row, level, len(request.borrowed)) == request.borrowed
            assert not (request.borrowed and self.slots.reserved(row))
            assert listed(self.slots, row, 1, len(request.late)) == request.late
            if request.state is None or self.steps == 1 or not request.late:
                continue
            first, second = request.state.plan.kept_counts
            generated = request.late[first:]
            assert listed(self.slots, row, 2, second + len(generated))[second:] == generated
            if request.prefilled:
                assert listed(self.slots, row, 2, second) == [request.late[i] for i in request.subset]

    def teardown(self) -> None:
        if hasattr(self, "live"):
            for row in list(self.live):
                self.release(row)
            assert self.slots.held == 0


TestSchedules = LateSlotsMachine.TestCase
TestSchedules.settings = settings(
    max_examples=SCHEDULES, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


# --- single moments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(6,), (6, 3)], ids=["one-step", "two-steps"])
def test_a_started_prompt_can_be_finished(counts: tuple[int, ...]) -> None:
    # The first chunk takes all the late slots the prompt can need, however short the chunk is.
    _, allocator, slots = make_pool(len(counts), size=20)
    slots.bind(1, make_state(12, counts), generated=0)
    assert not slots.reserved(1) and not slots.reserved(2) and not slots.reserved(None)
    extend(slots, {1: 3})
    assert slots.held == 6 and slots.reserved(1) and allocator.available_size() == 14
    extend(slots, {1: 9})
    extend(slots, {1: 12})
    assert slots.held == 6
    extend(slots, {1: 13})
    assert slots.held == 7


def test_generated_tokens_of_a_retracted_request_are_reserved_with_its_prompt() -> None:
    _, _, slots = make_pool(2, size=30)
    slots.bind(1, make_state(12, (6, 3)), generated=4)
    extend(slots, {1: 3})
    assert slots.held == 10
    assert listed(slots, 1, 2, 7)[3:] == listed(slots, 1, 1, 10)[6:]
    extend(slots, {1: 16})
    assert slots.held == 10
    extend(slots, {1: 17})
    assert slots.held == 11
    assert listed(slots, 1, 2, 8)[3:] == listed(slots, 1, 1, 11)[6:]


def test_several_tokens_at_once_reach_every_steps_row() -> None:
    _, _, slots = make_pool(2, size=40)
    slots.bind(1, make_state(12, (6, 3)), generated=0)
    slots.bind(3, make_state(10, (5, 2)), generated=0)
    extend(slots, {1: 12, 3: 10})
    extend(slots, {1: 15, 3: 11})  # not one each
    extend(slots, {1: 16, 3: 12})  # one each
    extend(slots, {1: 18, 3: 15})  # not one each, behind generated tokens
    assert listed(slots, 1, 2, 9)[3:] == listed(slots, 1, 1, 12)[6:]
    assert listed(slots, 3, 2, 7)[2:] == listed(slots, 3, 1, 10)[5:]


def test_running_out_takes_nothing() -> None:
    asked: list[int] = []
    _, allocator, slots = make_pool(1, size=10)
    slots.evict = asked.append
    slots.bind(1, make_state(12, (6,)), generated=0)
    slots.bind(2, make_state(12, (6,)), generated=0)
    before = slots.table.clone()
    with pytest.raises(OutOfLateSlots, match="need 12 KV slots, 10 are free"):
        extend(slots, {1: 12, 2: 12})
    assert asked == [12]  # eviction was tried first
    assert slots.held == 0 and allocator.available_size() == 10 and torch.equal(slots.table, before)
    extend(slots, {1: 12})
    assert slots.held == 6


def test_dense_rows_are_left_alone() -> None:
    _, allocator, slots = make_pool(1, size=10)
    extend(slots, {1: 40, 2: 40})
    slots.free(1)
    assert slots.held == 0 and allocator.available_size() == 10 and bool((slots.table == -1).all())


def test_a_row_that_was_not_freed_cannot_be_taken() -> None:
    _, _, slots = make_pool(1, size=10)
    state = make_state(4, (2,))
    slots.bind(1, state, generated=0)
    slots.bind(1, state, generated=0)
    with pytest.raises(ValueError, match="row 1 is still bound"):
        slots.bind(1, make_state(4, (2,)), generated=0)  # equal, but another request's
    slots.free(1)
    slots.bind(1, make_state(4, (2,)), generated=0)


def test_freed_slots_stay_freed_when_the_row_is_written_again() -> None:
    # Frees may be held back in a group while the row is reused.
    _, allocator, slots = make_pool(1, size=4)
    slots.bind(1, make_state(4, (2,)), generated=0)
    extend(slots, {1: 4})
    allocator.free_group_begin()
    slots.free(1)
    slots.bind(1, make_state(4, (2,)), generated=0)
    extend(slots, {1: 4})
    allocator.free_group_end()
    assert allocator.available_size() == 2 and owned_twice(allocator, slots) == []


def test_holdings_are_the_slots_of_each_row() -> None:
    _, _, slots = make_pool(1, size=20)
    for row in (1, 2, 3):
        slots.bind(row, make_state(8, (4,)), generated=0)
    extend(slots, {1: 8, 2: 9})
    held = {row: slots_of_row.tolist() for row, slots_of_row in slots.holdings()}
    assert held == {1: listed(slots, 1, 1, 4), 2: listed(slots, 2, 1, 5)}


def test_a_slot_set_aside_is_owned_until_the_next_or_the_end() -> None:
    _, allocator, slots = make_pool(1, size=20)
    state = make_state(8, (4,))
    slots.bind(1, state, generated=0)
    extend(slots, {1: 8})
    for free in (15, 15):  # the second takes the place of the first
        slot = allocator.alloc(1)
        slots.set_aside(1, slot)
        assert state.progress.last_slot is slot and slots.held == 5 and allocator.available_size() == free
        assert slot.item() in dict(slots.holdings())[1].tolist() and owned_twice(allocator, slots) == []
    slots.free(1)
    assert slots.held == 0 and allocator.available_size() == 20 and state.progress.last_slot is None


def test_a_freed_row_starts_its_late_prefill_again() -> None:
    # A request that is retracted between the parts of its late prefill has lost their KV.
    _, _, slots = make_pool(1, size=20)
    state = make_state(8, (4,))
    slots.bind(1, state, generated=0)
    state.progress.late_spans[0] = (1, 3)
    slots.free(1)
    assert set(state.progress.late_spans) == {(0, 0)}


@pytest.mark.parametrize("counts", [(5,), (5, 5)], ids=["one-step", "two-steps"])
def test_borrowed_slots_are_listed_at_every_level_and_stay_their_lender_s(counts: tuple[int, ...]) -> None:
    _, allocator, slots = make_pool(len(counts), size=20)
    lent = allocator.alloc(5)
    state = make_state(5, counts)
    state.progress.borrowed = lent
    slots.bind(1, state, generated=0)
    slots.bind(2, make_state(8, (4, 2)[: len(counts)]), generated=0)
    extend(slots, {1: 5, 2: 8})
    assert [listed(slots, 1, level, 5) for level in range(1, len(counts) + 1)] == [lent.tolist()] * len(counts)
    assert slots.held == 4 and not slots.reserved(1) and [row for row, _ in slots.holdings()] == [2]
    slots.free(1)
    slots.free(2)
    assert slots.held == 0 and allocator.available_size() == 15  # the lender has them still


def test_a_table_that_is_no_multiple_of_stocks_is_refused() -> None:
    with pytest.raises(ValueError, match="7 rows, not a multiple"):
        LateSlots(
            torch.zeros(7, 4, dtype=torch.int32), 5, TokenToKVPoolAllocator(4, torch.int64, "cpu", None, False), id
        )
