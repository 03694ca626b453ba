"""The batch plan: who runs which rows at which level."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from claa_sglang.config.budget import kept_counts
from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.forward.batch_plan import BatchPlan, Segment, late_len, plan_decode, plan_extend, plan_observed
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import Progress, RequestPlan, RequestState

STRIDE, WINDOW = 100, 4


def make_state(prompt: int, counts: tuple[int, ...]) -> RequestState:
    steps = tuple(PruneStep(prune_layer=i, keep_rate=0.5 / (i + 1), score_layers=(i,)) for i in range(len(counts)))
    return RequestState(RequestPlan(RequestOptions(), prompt, steps, counts), Progress.before_any(len(counts)))


class Entry(NamedTuple):
    """A request of a prefill batch."""

    state: RequestState | None
    row: int
    prefix: int
    extend: int
    last: bool

    @property
    def pruned(self) -> bool:
        return self.state is not None and self.state.pruned


@st.composite
def entries(draw: st.DrawFn, steps: int) -> list[Entry]:
    """Dense requests with and without a state, and pruned ones: cold, with a prefix, mid-chunk, resumed."""
    rows = draw(st.lists(st.integers(1, STRIDE - 1), unique=True, min_size=1, max_size=6))
    result = []
    for row in rows:
        prompt, generated = draw(st.integers(2, 60)), draw(st.sampled_from([0, 0, 3]))
        end = draw(st.integers(1, prompt + generated))
        if draw(st.booleans()):
            end = prompt + generated
        prefix = draw(st.integers(0, end - 1))
        rates = draw(st.sampled_from([(0.5, 0.2), (1.0, 0.3), (0.01, 0.001)]))
        kind = draw(st.sampled_from(["pruned", "pruned", "none", "dense"]))
        state = None
        if kind == "pruned":
            state = make_state(prompt, kept_counts(prompt, rates[:steps], WINDOW))
            totals = [count + max(0, end - prompt) for count in state.plan.kept_counts]
            # One level is under way; those before it are complete.
            level = draw(st.integers(0, steps - 1))
            for before in range(level):
                start = draw(st.integers(0, totals[before]))
                state.progress.late_spans[before] = (start, totals[before])
            start = draw(st.integers(0, totals[level] - 1))
            state.progress.late_spans[level] = (start, draw(st.integers(start + (level == 0), totals[level])))
        elif kind == "dense":
            state = RequestState.dense_request(RequestOptions(), prompt, "short")
        result.append(Entry(state, row, prefix, end - prefix, end == prompt + generated))
    return result


def plan(batch: list[Entry], steps: int) -> BatchPlan | None:
    return plan_extend(
        [e.state for e in batch],
        rows=[e.row for e in batch],
        prefix_lens=[e.prefix for e in batch],
        extend_lens=[e.extend for e in batch],
        last_chunk=[e.last for e in batch],
        table_stride=STRIDE,
        num_steps=steps,
    )


def back_to_back(segments: tuple[Segment, ...]) -> bool:
    starts = [0, *(s.end for s in segments)]
    return all(s.start == start and s.rows >= 0 for s, start in zip(segments, starts, strict=False))


STEPS = pytest.mark.parametrize("steps", [1, 2])


@STEPS
@given(data=st.data())
def test_every_level_of_a_prefill(steps: int, data: st.DataObject) -> None:
    batch = data.draw(entries(steps))
    made = plan(batch, steps)
    if not any(e.pruned for e in batch):
        assert made is None
        return
    assert made is not None and not made.decode and len(made.levels) == steps + 1

    stock = made.levels[0]
    assert [s.request for s in stock] == list(range(len(batch)))
    for segment, entry in zip(stock, batch, strict=True):
        assert (segment.row, segment.prefix_len, segment.rows) == (entry.row, entry.prefix, entry.extend)
        assert segment.seq_len == entry.prefix + entry.extend and segment.complete == entry.last
        assert segment.state is (entry.state if entry.pruned else None)
    assert made.rows(0) == sum(e.extend for e in batch)

    for level, segments in enumerate(made.levels):
        assert back_to_back(segments) and made.rows(level) == sum(s.rows for s in segments)
        if level == 0:
            continue
        # Dense requests, and pruned ones that are complete at the level before, in batch order.
        complete = {s.request for s in made.levels[level - 1] if s.complete}
        assert [s.request for s in segments] == [i for i, e in enumerate(batch) if i in complete or not e.pruned]
        for segment in segments:
            entry = batch[segment.request]
            if not entry.pruned:
                same = stock[segment.request]
                assert (segment.row, segment.rows, segment.prefix_len) == (same.row, same.rows, same.prefix_len)
                assert segment.seq_len == same.seq_len and segment.state is None
                continue
            state = entry.state
            assert state is not None and segment.state is state
            generated = entry.prefix + entry.extend - state.plan.prompt_tokens
            assert segment.row == entry.row + level * STRIDE
            # The late row is written from its beginning, whatever of the prompt was cached, and maybe in parts.
            start, end = state.progress.late_spans[level - 1]
            assert (segment.prefix_len, segment.seq_len) == (start, end) and segment.rows == end - start
            assert segment.complete == (end == state.plan.kept_counts[level - 1] + generated)
    assert [s.request for s in made.pruned] == [i for i, e in enumerate(batch) if e.pruned]
    assert all(s in stock for s in made.pruned)


@STEPS
@given(data=st.data())
def test_every_level_of_a_decode(steps: int, data: st.DataObject) -> None:
    batch = data.draw(entries(steps))
    assume(any(e.pruned for e in batch))
    lens = [(e.state.plan.prompt_tokens if e.state else 5) + data.draw(st.integers(1, 9)) for e in batch]
    made = plan_decode(
        [e.state for e in batch], rows=[e.row for e in batch], seq_lens=lens, table_stride=STRIDE, num_steps=steps
    )
    assert made is not None and made.decode and len(made.levels) == steps + 1
    for level, segments in enumerate(made.levels):
        assert made.rows(level) == len(batch)
        for i, (segment, entry) in enumerate(zip(segments, batch, strict=True)):
            assert (segment.request, segment.start, segment.end, segment.complete) == (i, i, i + 1, True)
            row, length = entry.row, lens[i]
            if entry.pruned and level > 0:
                assert entry.state is not None
                row += level * STRIDE
                length = entry.state.plan.kept_counts[level - 1] + lens[i] - entry.state.plan.prompt_tokens
            assert (segment.row, segment.seq_len, segment.prefix_len) == (row, length, length - 1)
            assert segment.state is (entry.state if entry.pruned else None)


@STEPS
def test_a_batch_without_pruned_requests_has_no_plan(steps: int) -> None:
    dense = RequestState.dense_request(RequestOptions(), 9, "short")
    states = [None, dense]
    extend = plan_extend(
        states,
        rows=[1, 2],
        prefix_lens=[0, 0],
        extend_lens=[4, 9],
        last_chunk=[True, True],
        table_stride=STRIDE,
        num_steps=steps,
    )
    decode = plan_decode(states, rows=[1, 2], seq_lens=[5, 10], table_stride=STRIDE, num_steps=steps)
    assert extend is None and decode is None


def test_only_chunks_in_the_middle_leave_the_late_levels_empty() -> None:
    made = plan([Entry(make_state(50, (10, 5)), 1, 0, 20, False)], steps=2)
    assert made is not None and made.levels[1:] == ((), ())
    assert made.rows(0) == 20 and made.rows(1) == made.rows(2) == 0


def test_a_mixed_batch_by_hand() -> None:
    batch = [
        Entry(make_state(20, (10, 5)), 1, 12, 8, True),  # prefix hit
        Entry(None, 2, 3, 4, False),
        Entry(make_state(30, (15, 7)), 3, 8, 10, False),  # mid-prompt
        Entry(make_state(16, (8, 4)), 4, 0, 19, True),  # resumed with 3 generated tokens
    ]
    first, last = batch[0].state.progress, batch[3].state.progress
    first.late_spans, last.late_spans = [(0, 10), (0, 5)], [(0, 11), (0, 7)]
    made = plan(batch, steps=2)
    assert made is not None
    compact = [[(s.request, s.start, s.end, s.row, s.prefix_len, s.seq_len) for s in level] for level in made.levels]
    assert compact == [
        [(0, 0, 8, 1, 12, 20), (1, 8, 12, 2, 3, 7), (2, 12, 22, 3, 8, 18), (3, 22, 41, 4, 0, 19)],
        [(0, 0, 10, 101, 0, 10), (1, 10, 14, 2, 3, 7), (3, 14, 25, 104, 0, 11)],
        [(0, 0, 5, 201, 0, 5), (1, 5, 9, 2, 3, 7), (3, 9, 16, 204, 0, 7)],
    ]


def test_the_parts_of_a_late_prefill_by_hand() -> None:
    state = make_state(20, (10, 5))
    parts = [[(0, 6), (0, 0)], [(6, 10), (0, 0)], [(10, 10), (0, 3)], [(10, 10), (3, 5)]]
    seen = []
    for part in parts:
        state.progress.late_spans = part
        made = plan([Entry(state, 1, 19, 1, True), Entry(None, 2, 0, 4, True)], steps=2)
        assert made is not None
        seen.append([[(s.prefix_len, s.seq_len) for s in level if s.state is not None] for level in made.levels[1:]])
        assert [made.rows(level) - 4 for level in (1, 2)] == [end - start for start, end in part]
    # After the second prune it is in the plan when all before it is there, if the step has room for it or not.
    assert seen == [[[(0, 6)], []], [[(6, 10)], [(0, 0)]], [[(10, 10)], [(0, 3)]], [[(10, 10)], [(3, 5)]]]


def test_late_length_counts_kept_and_generated_tokens() -> None:
    state = make_state(100, (50, 20))
    assert [late_len(state, level, 100) for level in (1, 2)] == [50, 20]
    assert [late_len(state, level, 107) for level in (1, 2)] == [57, 27]


def test_the_dense_part_leaves_pruned_requests_out_and_closes_the_gaps() -> None:
    config = msgspec.convert(
        {"steps": [{"prune_layer": 1, "keep_rate": 0.5, "score_layers": [1]}], "num_layers": 4, "window": 2}, ClaaConfig
    )
    pruned = RequestState.pruned_request(RequestOptions(), config, prompt_tokens=10)
    plan = plan_extend(
        [None, pruned, None],
        rows=[1, 2, 3],
        prefix_lens=[0, 0, 4],
        extend_lens=[6, 10, 3],
        last_chunk=[True] * 3,
        table_stride=8,
        num_steps=1,
    )
    assert plan is not None
    rest = plan.dense_part()
    assert rest is not None and rest.levels[0] == plan.levels[0]
    assert [(s.request, s.start, s.end, s.row, s.prefix_len) for s in rest.levels[1]] == [
        (0, 0, 6, 1, 0),
        (2, 6, 9, 3, 4),
    ]
    alone = plan_extend(
        [pruned], rows=[2], prefix_lens=[0], extend_lens=[10], last_chunk=[True], table_stride=8, num_steps=1
    )
    assert alone is not None and alone.dense_part() is None


def observed(prompt: int) -> RequestState:
    state = make_state(prompt, (prompt // 2,))
    return replace(state, plan=replace(state.plan, dense_reason="observed"))


@given(st.data())
def test_observed_requests_are_ranked_where_their_window_is_all_there(data: st.DataObject) -> None:
    """Once, in the chunk that ends the prompt, with rows that are the batch's own."""
    states, prefixes, extends = [], [], []
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["observed", "dense", "none"]))
        prompt = data.draw(st.integers(WINDOW + 1, 40))
        prefix = data.draw(st.integers(0, prompt - 1))
        extend = data.draw(st.integers(1, prompt - prefix + 3))  # beyond the prompt: after a retraction
        dense = RequestState.dense_request(RequestOptions(), prompt, "short")
        states.append({"observed": observed(prompt), "dense": dense, "none": None}[kind])
        prefixes.append(prefix)
        extends.append(extend)
    rows = list(range(len(states)))
    asked = {"rows": rows, "prefix_lens": prefixes, "extend_lens": extends, "window": WINDOW}
    found = plan_observed(states, **asked)
    wanted = [
        i
        for i, state in enumerate(states)
        if state is not None
        and state.observed
        and prefixes[i] + extends[i] == state.plan.prompt_tokens
        and extends[i] >= WINDOW
    ]
    assert [s.request for s in found] == wanted
    for s in found:
        assert (s.start, s.end) == (sum(extends[: s.request]), sum(extends[: s.request + 1]))
        assert (s.prefix_len, s.seq_len, s.row) == (prefixes[s.request], s.state.plan.prompt_tokens, s.request)
        s.state.progress.kept[0] = object()
    assert plan_observed(states, **asked) == ()
