"""One forward of a batch with pruned requests: scores in, kept tokens out, rows in and out of the late layers.

Holds the tensors of one forward and nothing else; a new one is made for every forward. The four moments, in order:
`score` after each scored layer, `cross` at each prune, `leave` after the last layer. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from claa_sglang.config.config import ClaaConfig
from claa_sglang.forward.active_pass import ActivePass
from claa_sglang.forward.batch_plan import BatchPlan, Segment
from claa_sglang.forward.explaining import LookedAt
from claa_sglang.forward.kept_rows import KeptView
from claa_sglang.forward.late_view import make_view, on_device
from claa_sglang.forward.ranks import RankFailed, Ranks, RanksDiffer
from claa_sglang.forward.scorers import Scored, Scorer, make_scorer
from claa_sglang.memory.boundary import BoundaryStore
from claa_sglang.ranking.selection import select
from claa_sglang.requests.step_scores import StepScores

# Called with a view and its level once the view's table rows are complete: plans attention for it. The view of kept
# tokens has the number after the last level's.
Prepare = Callable[[Any, int], None]


class LatePass(ActivePass):
    """State of one forward.

    Args:
        plan: who runs what.
        batch: SGLang's ForwardBatch of the early layers.
        table: the widened request table.
        config: the server's configuration.
        prepare: plans attention of a level's view.
        ranks: those of tensor parallelism, each of which scores its own KV heads; None for a model that is not split.
        checked: whether rows of kept tokens are compared with what their requests have.
        shared: whether late rows after the first list some of its slots (`memory/pages.py`); else they have their own.
    """

    def __init__(
        self,
        plan: BatchPlan,
        batch: Any,
        table: Tensor,
        config: ClaaConfig,
        prepare: Prepare,
        ranks: Ranks | None,
        shared: bool = True,
        checked: bool = False,
    ) -> None:
        self.plan = plan
        self.batch = batch
        self._table = table
        self._config = config
        self._prepare = prepare
        self._ranks = ranks
        self._shared = shared
        self._scorers: dict[int, Scorer] = {}  # of each level
        self._looked_at: LookedAt | None = None  # of those who ask, at level 0
        # Those that failed before, whose end the scheduler has not come to. As it is now: a failure in this forward is
        # known to this rank alone until they agree, and where it was, others may have ranked already.
        self._failed = frozenset(state for state in plan.pruned_states if state.progress.error is not None)
        self.views: list[Any] = [batch] + [None] * len(config.steps)
        self.kept: KeptView | None = None
        if plan.kept:
            self.kept = KeptView.of(plan, batch, table, checked)
            prepare(self.kept.batch, len(config.steps) + 1)
        # The first late level's table rows are complete before layer 0; a later level's need a ranking.
        for level in range(1, len(plan.levels) if plan.decode else 2):
            self._make_view(level)

    @property
    def has_late_rows(self) -> bool:
        """Whether any row reaches the late layers: not if every request is pruned and in the middle of its prompt."""
        return any(self.plan.rows(level) for level in range(1, len(self.plan.levels)))

    def _make_view(self, level: int) -> None:
        """Make and plan the view of a level that has rows; of any other it stays None."""
        segments = [s for s in self.plan.levels[level] if s.rows]
        if not segments:
            return
        view = make_view(self.batch, segments, self._table, decode=self.plan.decode)
        self.views[level] = view
        self._prepare(view, level)

    def without_pruned(self) -> LatePass | None:
        """A pass over the same forward for its dense requests alone; None when there are none."""
        plan = self.plan.dense_part()
        if plan is None:
            return None
        return LatePass(plan, self.batch, self._table, self._config, self._prepare, self._ranks, self._shared)

    # --- ranking -------------------------------------------------------------------------------------------------

    def needs_scores(self, level: int, layer_id: int) -> bool:
        """Whether `layer_id`, which runs at `level`, is scored for the prune at the end of that level."""
        return (
            not self.plan.decode
            and level < len(self._config.steps)
            and layer_id in self._config.steps[level].score_layers
            and any(self._is_ranked(s, level) for s in self.plan.levels[level])
        )

    def _is_ranked(self, segment: Segment, level: int) -> bool:
        """Whether the prune after `level` needs a ranking of this request.

        Not before its rows at this level are complete; not if it keeps everything it has, if it was ranked in an
        earlier forward, or if it failed there.
        """
        state = segment.state
        if state is None or not segment.complete or state.progress.kept[level] is not None or state in self._failed:
            return False
        return state.plan.kept_counts[level] < self._prompt_rows(segment, level)

    @staticmethod
    def _prompt_rows(segment: Segment, level: int) -> int:
        """Prompt tokens of a pruned request that are visible at `level`."""
        state = segment.state
        assert state is not None
        return state.plan.prompt_tokens if level == 0 else state.plan.kept_counts[level - 1]

    def score(self, level: int, queries: Tensor, key_buffer: Tensor, scaling: float) -> None:
        """Score the prompt tokens of every request that is about to be pruned; arguments as for `Scorer.score`."""
        if level not in self._scorers:
            window = self._config.window
            scored = [
                (Scored(s.request, s.state, s.end - window, s.row, self._prompt_rows(s, level)), s.rows)
                for s in self.plan.levels[level]
                if s.state is not None and self._is_ranked(s, level)
            ]
            self._scorers[level] = make_scorer([one for one, _ in scored], self._table, self._config)
            if level == 0:
                self._looked_at = LookedAt.of(scored, self._table, window)
        self._scorers[level].score(queries, key_buffer, scaling)
        if level == 0 and self._looked_at is not None:
            self._looked_at.add(queries, key_buffer, scaling)

    def _choose(self, segment: Segment, level: int) -> Tensor:
        """Which of the prompt tokens visible at `level` go on: int64 indices into them, ascending. Of a request that
        failed before, any: nobody reads its answer."""
        state = segment.state
        assert state is not None
        progress = state.progress
        visible, count = self._prompt_rows(segment, level), state.plan.kept_counts[level]
        before = None if level == 0 else progress.kept[level - 1]
        if (known := progress.kept[level]) is not None:
            return known if before is None else torch.searchsorted(before, known)
        if count == visible or state in self._failed:
            chosen = torch.arange(count, device=self._table.device)
        else:
            # Before the ranking is asked for, which lets go of the scores of the layers.
            layers = self._scorers[level].layers(segment.request) if state.plan.options.explain else []
            ranking = self._ranking(segment, level)
            chosen = select(ranking, visible, count, self._config.window)
            if state.plan.options.explain:
                progress.explained[level] = StepScores(ranking, layers, self._looks(segment, level))
        progress.kept[level] = chosen if before is None else before[chosen]
        if level == 0:
            progress.late_computed_tokens = count
        return chosen

    def _looks(self, segment: Segment, level: int) -> list[Tensor]:
        """What the last tokens look at, of each scored layer; none where it is not asked for."""
        return [] if level > 0 or self._looked_at is None else self._looked_at.layers(segment.request)

    def _ranking(self, segment: Segment, level: int) -> Tensor:
        """fp32 `[visible - window]`: the ranking of the request's prompt tokens, of all KV heads."""
        return self._scorers[level].ranking(segment.request)

    # --- ranks ---------------------------------------------------------------------------------------------------

    @property
    def is_alone(self) -> bool:
        """Whether no other rank takes part, so that a failure anywhere concerns this process only."""
        return self._ranks is None

    def merge_scores(self, level: int) -> None:
        """Before the prune after `level`: have the scores of all ranks. All take part, whatever failed on one."""
        if level in self._scorers and self._ranks is not None:
            self._scorers[level].merge(self._ranks)

    def agree_on_failures(self, error: Exception | None) -> None:
        """After what each rank does by itself, and before what all do together: all go on, or none.

        Requests that failed to be scored on one rank have failed on all. Raises `error`, what this rank failed with,
        or RankFailed where another one did; RanksDiffer where they are compared and did not choose the same tokens.
        """
        ranks, states = self._ranks, self.plan.pruned_states
        if ranks is not None:
            mine = [error is not None, *(state.progress.error is not None for state in states)]
            failed, *of_states = ranks.any_of(mine)
            for state, has_failed in zip(states, of_states, strict=True):
                if has_failed and state.progress.error is None:
                    state.progress.fail("scoring or ranking its prompt", RankFailed())
            if failed and error is None:
                error = RankFailed()
        if error is not None:
            raise error
        if ranks is not None and ranks.checked:
            going_on = [state.progress for state in states if state.progress.error is None]
            kept = [kept for progress in going_on for kept in progress.kept if kept is not None]
            if not ranks.are_same(kept):
                raise RanksDiffer("tensor-parallel ranks did not keep the same tokens")

    # --- moving rows ---------------------------------------------------------------------------------------------

    def cross(
        self, level: int, hidden: Tensor, residual: Tensor, positions: Tensor, boundary: BoundaryStore
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Prune: from the rows of `level` to the rows of `level + 1`.

        Args:
            hidden, residual: `[rows of level, H]`, whose sum is the residual stream.
            positions: int64 `[rows of level]`.
            boundary: where the states of tokens outside this forward are, and go: those of this level.

        Returns:
            (hidden, residual, positions, view) of the next level; view is None if it has no rows.
        """
        if self.plan.decode:
            return self._cross_in_decode(level, hidden, residual, positions)
        if level > 0:
            self._keep_states(level, hidden, residual, boundary)
        hiddens, residuals, places = [hidden[:0]], [residual[:0]], [positions[:0]]
        here = {s.request: s for s in self.plan.levels[level]}
        # Not here any more: pruned requests whose rows are not complete, and those whose late pass failed.
        for target in self.plan.levels[level + 1]:
            segment = here[target.request]
            rows: Tensor | slice = slice(segment.start, segment.end)
            if target.state is not None:
                seen = self._seen(segment, self._choose(segment, level), level)
                if level > 0 and target.prefix_len == 0 and self._shared:
                    self._table[target.row, : seen.shape[0]] = self._table[segment.row, seen]
                # Of a late prefill in several parts, this forward's.
                part = seen[target.prefix_len : target.seq_len]
                # A step of finishing has no states of its own before the first prune: its early layers do not run.
                if segment.prefix_len > 0 or (level == 0 and self.plan.only_late):
                    h, r = boundary.load(self._table[segment.row, part].to(torch.int64))
                    hiddens.append(h)
                    residuals.append(r)
                    places.append(self._positions(segment, part, level).to(positions.dtype))
                    continue
                rows = part + segment.start
            hiddens.append(hidden[rows])
            residuals.append(residual[rows])
            places.append(positions[rows])
        if level > 0:
            self._make_view(level + 1)
        view, places = self.views[level + 1], torch.cat(places)
        if view is not None:
            view.positions = places
        return torch.cat(hiddens), torch.cat(residuals), places, view

    def _keep_states(self, level: int, hidden: Tensor, residual: Tensor, boundary: BoundaryStore) -> None:
        """Store the states after level >= 1 that are not all read in this forward, in the rows of the late slots that
        only layers of the next level will use."""
        ends = {s.request for s in self.plan.levels[level + 1] if s.complete}
        for segment in self.plan.levels[level]:
            if segment.state is None or not segment.rows or (segment.prefix_len == 0 and segment.request in ends):
                continue
            own = slice(segment.start, segment.end)
            boundary.store(self.views[level].out_cache_loc[own], hidden[own], residual[own])

    def _cross_in_decode(
        self, level: int, hidden: Tensor, residual: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """One row a request: every row goes on, except pruned ones that were left out after a failure."""
        view, segments = self.views[level + 1], self.plan.levels[level + 1]
        if len(segments) == len(self.plan.levels[level]):
            if level == 0 and len(self.plan.pruned) < len(segments):
                # Layers may write into their input; dense rows must survive a failure of the late pass.
                hidden, residual = hidden.clone(), residual.clone()
            return hidden, residual, positions, view
        (rows,) = on_device([[s.request for s in segments]], torch.int64, hidden.device)
        view.positions = positions[rows]
        return hidden[rows], residual[rows], view.positions, view

    def _seen(self, segment: Segment, chosen: Tensor, level: int) -> Tensor:
        """Columns of the segment's table row that go on: the chosen prompt tokens, then every generated token."""
        first = self._prompt_rows(segment, level)
        if segment.seq_len == first:
            return chosen
        return torch.cat((chosen, torch.arange(first, segment.seq_len, device=chosen.device)))

    def _positions(self, segment: Segment, columns: Tensor, level: int) -> Tensor:
        """Positions in the sequence of the tokens in these columns of the segment's table row."""
        if level == 0:
            return columns
        assert segment.state is not None
        prompt, before = segment.state.plan.prompt_tokens, segment.state.progress.kept[level - 1]
        assert before is not None
        generated = segment.seq_len - before.shape[0]
        return torch.cat((before, torch.arange(prompt, prompt + generated, device=before.device)))[columns]

    def boundary_rows(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(slots, hidden, residual) of the pruned requests' rows at level 0: what the boundary store keeps.

        Rows of dense requests are left out: the late-layer rows of their slots hold their real KV.
        """
        pruned = self.plan.pruned
        slots = self.batch.out_cache_loc
        if len(pruned) == len(self.plan.levels[0]):
            return slots, hidden, residual
        if self.plan.decode:
            (rows,) = on_device([[s.start for s in pruned]], torch.int64, hidden.device)
            return slots[rows], hidden[rows], residual[rows]
        parts = [slice(s.start, s.end) for s in pruned]
        return (
            torch.cat([slots[p] for p in parts]),
            torch.cat([hidden[p] for p in parts]),
            torch.cat([residual[p] for p in parts]),
        )

    def last_tokens(self) -> list[tuple[Tensor, Tensor]]:
        """(slots they had, slots they have now), int64 `[n]` each, of the last prompt tokens of each request whose late
        prefill goes on: the second are to get what the first hold, in every layer."""
        moved = []
        for segment in self.plan.pruned:
            assert segment.state is not None
            if (before := segment.state.progress.last_slots) is not None and not segment.decodes:
                now = self._table[segment.row, segment.seq_len - len(before) : segment.seq_len].to(torch.int64)
                moved.append((before, now))
        return moved

    def leave(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Put the last level's rows back where the logits processor looks for them.

        Returns (hidden, residual), each `[rows of level 0, H]`: all rows of dense requests, the last row of pruned
        ones. Other rows are zero; nobody reads them.
        """
        if self.plan.decode and len(self.plan.levels[-1]) == len(self.plan.levels[0]):
            return hidden, residual
        full_hidden = hidden.new_zeros(self.plan.rows(0), hidden.shape[1])
        full_residual = torch.zeros_like(full_hidden)
        first = {s.request: s for s in self.plan.levels[0]}
        for segment in self.plan.levels[-1]:
            target = first[segment.request]
            count = segment.rows if segment.state is None else min(1, segment.rows)
            source, place = slice(segment.end - count, segment.end), slice(target.end - count, target.end)
            full_hidden[place] = hidden[source]
            full_residual[place] = residual[source]
        return full_hidden, full_residual
