"""A model of tokens that know who they are, to drive late passes without SGLang.

A row of the residual stream says which token of which text it is; keys and queries are looked up by that identity. Each
layer writes its keys where the view says, and records what the view's table rows let every request read. What must have
been kept is in `late_answers.py`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.forward.batch_plan import BatchPlan, plan_decode, plan_extend
from claa_sglang.forward.late_pass import LatePass
from claa_sglang.forward.ranks import Ranks
from claa_sglang.memory.admission import LateRows
from claa_sglang.memory.boundary import BoundaryStore
from claa_sglang.memory.census import Owned, SlotCensus
from claa_sglang.memory.late_slots import LateSlots
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState

LAYERS, WINDOW, POOL_KERNEL, SCALING = 6, 4, 3, 0.7
TEXTS, WIDTH, STRIDE, SLOTS = 6, 64, 24, 4000
HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 8, 3
ONE_STEP = (PruneStep(prune_layer=2, keep_rate=0.5, score_layers=(1, 2)),)
TWO_STEPS = (*ONE_STEP, PruneStep(prune_layer=4, keep_rate=0.25, score_layers=(3, 4)))


class SlotPool:
    """Hands out slots of pages in no order, and says which were given back."""

    size = SLOTS

    def __init__(self, rng: random.Random, page_size: int) -> None:
        self.freed: list[int] = []
        self.page_size = page_size
        self._free = list(range(1, SLOTS // page_size + 1))
        rng.shuffle(self._free)

    def available_size(self) -> int:
        return len(self._free) * self.page_size

    def alloc(self, need_size: int) -> Tensor | None:
        assert need_size % self.page_size == 0
        return self._slots([self._free.pop() for _ in range(need_size // self.page_size)])

    def _slots(self, pages: list[int]) -> Tensor:
        return torch.tensor([page * self.page_size + i for page in pages for i in range(self.page_size)])

    def all_free(self) -> Tensor:
        return self._slots(self._free)

    def free_page_ids(self, page_ids: Tensor) -> None:
        self.freed += self._slots(page_ids.tolist()).tolist()
        self._free += page_ids.tolist()


@dataclass(eq=False)
class Request:
    """text: which text its tokens are; length: tokens whose stock KV exists; total: prompt and generated tokens."""

    text: int
    row: int
    prompt: int
    state: RequestState | None
    length: int = 0
    total: int = 0
    decodes: bool = False  # in the last forward
    boundary: set[int] = field(default_factory=set)

    @property
    def pruned(self) -> bool:
        return self.state is not None and self.state.pruned


class WatchedPass(LatePass):
    """A late pass of a world, which sees its rankings and may put others in their place."""

    def __init__(self, world: World, plan: BatchPlan, batch: Any) -> None:
        shared = world.slots.pages.are_shared
        super().__init__(plan, batch, world.table, world.config, world._prepare, world.ranks, shared, checked=True)
        self._world = world

    def _ranking(self, segment: Any, level: int) -> Tensor:
        ranking = super()._ranking(segment, level)
        self._world.rankings.append(ranking)
        return self._world.ranked(ranking)


class World:
    """One server's table, slots, caches and model. page: tokens of a page. dense_layers: in which generated tokens read
    the whole prompt; None for all before the first prune."""

    def __init__(
        self, steps: tuple[PruneStep, ...], seed: int = 0, page: int = 1, dense_layers: int | None = None
    ) -> None:
        self.rng = random.Random(seed)
        self.config = ClaaConfig(
            steps=steps,
            num_layers=LAYERS,
            window=WINDOW,
            pool_kernel=POOL_KERNEL,
            decode_dense_layers=dense_layers,
        )
        self.pool = SlotPool(self.rng, page)
        self.table = torch.full(((self.config.row_kinds + 1) * STRIDE, WIDTH), -1, dtype=torch.int32)
        self.slots = LateSlots(self.table, STRIDE, self.pool, evict=lambda _: None, steps=len(steps))
        generator = torch.Generator().manual_seed(seed)
        self.keys = 2 * torch.randn(LAYERS, TEXTS, WIDTH, KV_HEADS, DIM, generator=generator)
        self.queries = torch.randn(LAYERS, TEXTS, WIDTH, HEADS, DIM, generator=generator)
        self.key_buffers = torch.full((LAYERS, SLOTS + page, KV_HEADS, DIM), torch.nan)
        self.content: list[dict[int, tuple[int, int]]] = [{} for _ in range(LAYERS)]  # per layer: slot -> token
        self.stores = [
            BoundaryStore([torch.full((SLOTS + page, 1, 2 * HIDDEN), torch.nan)], HIDDEN, torch.float32) for _ in steps
        ]
        self.rows = list(range(1, STRIDE))
        self.rankings: list[Tensor] = []  # of the last forward, one a request and prune
        self.ranked = lambda ranking: ranking
        self.ranks: Ranks | None = None
        self.prepared: list[tuple[Any, int]] = []
        # Of the last forward: layer -> row of the stock table -> tokens its attention could read.
        self.read: dict[int, dict[int, list[tuple[int, int]]]] = {}
        # The same, of generated tokens in prefills.
        self.generated_read: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(dict)
        self.last: LatePass | None = None
        self.answers: dict[tuple[int, int, tuple[int, ...]], list[list[int]]] = {}

    # --- requests ---

    def add(self, text: int, prompt: int, pruned: bool = True, keep_rate: float | None = None) -> Request:
        options = RequestOptions(keep_rate=keep_rate)
        state = RequestState.dense_request(options, prompt, "short")
        if pruned:
            state = RequestState.pruned_request(options, self.config, prompt)
        return self._place(Request(text, -1, prompt, state, total=prompt))

    def _place(self, request: Request) -> Request:
        request.row = self.rows.pop(self.rng.randrange(len(self.rows)))
        if request.pruned:
            assert request.state is not None
            self.slots.bind(request.row, request.state, request.total - request.prompt)
        return request

    def hit(self, request: Request, donor: Request, length: int) -> None:
        """A prefix hit: the first `length` tokens have the donor's slots."""
        assert request.length == 0 and donor.pruned == request.pruned and donor.text == request.text
        self.table[request.row, :length] = self.table[donor.row, :length]
        request.length = length

    def release(self, request: Request) -> None:
        """The row goes; stock slots stay, as in a tree that is never full."""
        self.slots.free(request.row)
        self._forget_freed()
        self.table[request.row :: STRIDE] = -1
        self.rows.append(request.row)

    def _forget_freed(self) -> None:
        for slot in self.pool.freed:
            for tokens in self.content:
                tokens.pop(slot, None)
            self.key_buffers[:, slot] = torch.nan
        self.pool.freed.clear()

    def retract(self, request: Request) -> Request:
        """Retracted and admitted again, with nothing cached."""
        self.release(request)
        return self._place(Request(request.text, -1, request.prompt, request.state, total=request.total))

    def owned_twice(self) -> list[str]:
        """Late slots that are free as well, or have two owners."""
        late = [Owned(f"row {row}", slots) for row, slots in self.slots.holdings()]
        census = SlotCensus(SLOTS + self.pool.page_size - 1, "cpu")
        return census.shared([Owned("free", self.pool.all_free()), *late])

    # --- forwards ---

    def extend(
        self, chunks: list[tuple[Request, int]], late_rows: int | None = None, decoding: Sequence[Request] = ()
    ) -> dict[Request, Tensor]:
        """Prefill the next `n` tokens of each request, and one more token of each that is decoding: what the logits
        processor gets, per request.

        late_rows: most rows of late prefills in this step, after each prune. What is left of one takes its last page
            with it.
        """
        for request in decoding:
            request.total += 1
        chunks = [*chunks, *((request, 1) for request in decoding)]
        requests, extend = [r for r, _ in chunks], [n for _, n in chunks]
        for request in requests:
            request.decodes = request in decoding
        prefix = [r.length for r in requests]
        self._grow(requests, extend)
        late = LateRows(late_rows, len(self.config.steps), WINDOW)
        finished = [request.decodes or self._advance(late, request) for request in requests]
        plan = plan_extend(
            [r.state for r in requests],
            rows=[r.row for r in requests],
            prefix_lens=prefix,
            extend_lens=extend,
            last_chunk=[r.length == r.total for r in requests],
            table_stride=STRIDE,
            num_steps=len(self.config.steps),
            decoding=[r.decodes for r in requests],
        )
        assert plan is not None
        batch = self._batch(requests, extend)
        batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = extend, prefix
        out = self._forward(plan, batch, requests)
        for request, is_finished in zip(requests, finished, strict=True):
            if not is_finished:
                self._withhold_last_page(request)
        return dict(zip(requests, out.split(extend), strict=True))

    @staticmethod
    def _advance(late: LateRows, request: Request) -> bool:
        if not request.pruned or request.length < request.total:
            return True
        assert request.state is not None
        return late.advance(request.state, request.total - request.prompt)

    def _withhold_last_page(self, request: Request) -> None:
        end, request.length = request.length, self.slots.pages.round_down(request.length - 1)
        slots = self.table[request.row, request.length : end]
        self.slots.set_aside(request.row, slots.to(torch.int64))
        self._forget_freed()
        self.table[request.row, request.length :] = -1

    def decode(self, requests: list[Request]) -> Tensor:
        """One more token of each request."""
        for request in requests:
            request.total, request.decodes = request.total + 1, True
        self._grow(requests, [1] * len(requests))
        plan = plan_decode(
            [r.state for r in requests],
            rows=[r.row for r in requests],
            seq_lens=[r.length for r in requests],
            table_stride=STRIDE,
            num_steps=len(self.config.steps),
            stale=[self._is_stale(request) for request in requests],
        )
        assert plan is not None
        return self._forward(plan, self._batch(requests, [1] * len(requests)), requests)

    @staticmethod
    def _is_stale(request: Request) -> bool:
        if request.state is None:
            return False
        before, request.state.progress.listed = request.state.progress.listed, (request.row, 0)
        return before is None

    def cached(self, request: Request) -> None:
        """As when stock caches its prompt: the row lists other slots with the same in them, its own go back."""
        before = self.table[request.row, : request.prompt].clone()
        slots = self.pool.alloc(request.prompt)
        assert slots is not None and request.state is not None
        self.table[request.row, : request.prompt] = slots.to(torch.int32)
        for layer, tokens in enumerate(self.content):
            self.key_buffers[layer, slots] = self.key_buffers[layer, before.long()]
            tokens |= {
                new: tokens[old] for old, new in zip(before.tolist(), slots.tolist(), strict=True) if old in tokens
            }
        self.pool.free_page_ids(before.long())
        self._forget_freed()
        request.state.progress.listed = None

    def _grow(self, requests: list[Request], counts: list[int]) -> None:
        for request, count in zip(requests, counts, strict=True):
            pages = self.slots.pages
            start, end = (pages.round_up(n) for n in (request.length, request.length + count))
            slots = self.pool.alloc(end - start)
            assert slots is not None
            self.table[request.row, start:end] = slots.to(torch.int32)
            new = self.table[request.row, request.length : request.length + count]
            request.length += count
            request.boundary = set(new.tolist()) if request.pruned else set()
        self.slots.alloc_to_lengths(
            req_pool_indices_cpu=torch.tensor([r.row for r in requests]),
            target_seq_lens_cpu=torch.tensor([r.length for r in requests]),
        )

    def _batch(self, requests: list[Request], counts: list[int]) -> SimpleNamespace:
        spans = [range(r.length - n, r.length) for r, n in zip(requests, counts, strict=True)]
        lens = [r.length for r in requests]
        return SimpleNamespace(
            batch_size=len(requests),
            req_pool_indices=torch.tensor([r.row for r in requests]),
            seq_lens=torch.tensor(lens),
            seq_lens_cpu=torch.tensor(lens),
            seq_lens_sum=sum(lens),
            out_cache_loc=torch.cat(
                [self.table[r.row, s.start : s.stop] for r, s in zip(requests, spans, strict=True)]
            ).long(),
            positions=torch.tensor([p for s in spans for p in s]),
            texts=torch.tensor([r.text for r, s in zip(requests, spans, strict=True) for _ in s]),
            input_ids=torch.zeros(sum(counts), dtype=torch.int64),
            return_logprob=True,
            residual_stream="early",
        )

    def _prepare(self, view: Any, level: int) -> None:
        self.prepared.append((view, level))

    def _forward(self, plan: BatchPlan, batch: SimpleNamespace, requests: list[Request]) -> Tensor:
        self.prepared, self.rankings, self.read, self.generated_read = [], [], defaultdict(dict), defaultdict(dict)
        late = self.last = WatchedPass(self, plan, batch)
        # (text, position, layers run), and a residual that must travel with it.
        hidden = torch.stack((batch.texts, batch.positions, torch.zeros_like(batch.positions)), dim=1).float()
        residual = -hidden
        prunes = [step.prune_layer for step in self.config.steps]
        hidden = self._layers(late, 0, range(prunes[0] + 1), batch, hidden, residual, batch.positions)
        slots, *states = late.boundary_rows(hidden, residual)
        assert sorted(slots.tolist()) == sorted(s for r in requests for s in r.boundary)
        self.stores[0].store(slots, *states)
        stored = self.stores[0].load(slots)[0][:, :2].long().tolist()
        assert [tuple(token) for token in stored] == [self.content[0][slot] for slot in slots.tolist()]
        for before, now in late.last_tokens():  # the tokens that are computed again, where they were and are
            assert not set(before.tolist()) & set(now.tolist())
            assert [self.content[0][s] for s in before.tolist()] == [self.content[0][s] for s in now.tolist()]
        for layer in range(prunes[0] + 1, LAYERS):
            self.key_buffers[layer, slots] = torch.nan  # the states live there
            for slot in slots.tolist():
                self.content[layer].pop(slot, None)
        if not late.has_late_rows:
            return torch.zeros_like(hidden)
        positions = batch.positions
        for level, (prune, end) in enumerate(zip(prunes, [*prunes[1:], LAYERS - 1], strict=True)):
            late.merge_scores(level)
            hidden, residual, positions, view = late.cross(level, hidden, residual, positions, self.stores[level])
            if view is None:
                assert hidden.shape[0] == late.plan.rows(level + 1) == 0
                continue
            hidden = self._layers(late, level + 1, range(prune + 1, end + 1), view, hidden, residual, positions)
        hidden, residual = late.leave(hidden, residual)
        assert torch.equal(residual[:, :2], -hidden[:, :2])
        return hidden

    def _layers(
        self, late: LatePass, level: int, layers: range, view: Any, hidden: Tensor, residual: Tensor, positions: Tensor
    ) -> Tensor:
        texts, places = hidden[:, 0].long(), hidden[:, 1].long()
        assert torch.equal(positions, places) and torch.equal(view.positions, places)
        assert torch.equal(residual[:, :2], -hidden[:, :2])
        assert view.out_cache_loc.shape == places.shape and view.out_cache_loc.dtype == torch.int64
        tokens = list(zip(texts.tolist(), places.tolist(), strict=True))
        for layer in layers:
            self.key_buffers[layer, view.out_cache_loc] = self.keys[layer, texts, places]
            self.content[layer] |= dict(zip(view.out_cache_loc.tolist(), tokens, strict=True))
            kept = late.kept if layer in self.config.kept_layers else None
            if kept is None or kept.rows is not None:
                self._read(late, layer, view, tokens, self.read)
            if kept is not None:
                rows = list(range(len(tokens))) if kept.rows is None else kept.rows.tolist()
                assert kept.batch.out_cache_loc.tolist() == view.out_cache_loc[rows].tolist()
                assert torch.equal(kept.batch.positions, positions[rows])
                into = self.read if kept.rows is None else self.generated_read
                self._read(late, layer, kept.batch, [tokens[row] for row in rows], into)
            if late.needs_scores(level, layer):
                late.score(level, self.queries[layer, texts, places], self.key_buffers[layer], SCALING)
            hidden = hidden + torch.tensor([0.0, 0.0, 1.0])
        return hidden

    def _read(self, late: LatePass, layer: int, view: Any, tokens: list[tuple[int, int]], into: dict) -> None:
        """What each request of a view reads; `tokens` are those of its rows."""
        start = 0
        for i, row in enumerate(view.req_pool_indices.tolist()):
            slots = self.table[row, : int(view.seq_lens[i])].tolist()
            read = into[layer][row % STRIDE] = [self.content[layer][slot] for slot in slots]
            # This forward's rows are the last that the request reads.
            count = 1 if late.plan.decode else view.extend_seq_lens_cpu[i]
            assert read[len(read) - count :] == tokens[start : start + count]
            start += count
        assert start == len(tokens)
