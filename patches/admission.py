"""Admission: a prefill step counts late slots and late rows, and chunks end where the window allows."""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder

from claa_sglang.memory.admission import LateRows, chunk_len
from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.memory import late_slots_of
from claa_sglang.patches.policy import must_wait, note_admitted, start_step
from claa_sglang.patches.requests import pruned_state
from claa_sglang.requests.state import RequestState
from claa_sglang.start.server_config import config_of


def new_tokens(req: Any) -> int:
    """Tokens the request may still generate, clipped as stock's admission clips them."""
    return min(max(req.sampling_params.max_new_tokens - len(req.output_ids), 0), CLIP_MAX_NEW_TOKENS)


def prefill_len(req: Any) -> int:
    """Tokens of the request's prefill: the prompt, and what was generated before a retraction."""
    return len(req.full_untruncated_fill_ids)


def make_adder(base: type[PrefillAdder], scheduler: Any) -> type[PrefillAdder]:
    """AFTER `get_prefill_adder_class`: a prefill adder that knows pruned requests.

    Stock asks for the class at every step; it is made once.
    """
    return attached.adder.find(scheduler) or attached.adder.hang(scheduler, _adder(base, scheduler))


def _adder(base: type[PrefillAdder], scheduler: Any) -> type[PrefillAdder]:
    config = config_of(scheduler.server_args)
    window = config.window
    slots = late_slots_of(scheduler.req_to_token_pool)
    pages = slots.pages

    def last_rows(req: Any) -> int:
        """Tokens that the last chunk of a pruned request must have."""
        state = pruned_state(req)
        return window if state is None else state.last_rows(window)

    class ClaaPrefillAdder(base):
        """Fills one prefill step. Only one request may leave a step unfinished, as in stock."""

        chunked_req_limit: int | None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._current: Any = None  # the pruned request being added
            super().__init__(*args, **kwargs)
            start_step(self.tree_cache)
            self._late = LateRows(self.rem_chunk_tokens, len(config.steps), window)

        # --- slots ---

        def _get_running_request_total_token_offset(self, req: Any) -> int:
            offset = super()._get_running_request_total_token_offset(req)
            state = pruned_state(req)
            return offset if state is None else (1 + pages.late_rows(state)) * offset

        def _request_slot_reserve_for_req(self, req: Any, *, extend_input_len: int | None = None) -> int:
            reserve = super()._request_slot_reserve_for_req(req, extend_input_len=extend_input_len)
            state = pruned_state(req)
            if state is None or slots.reserved(req.kv.req_pool_idx):
                return reserve
            return reserve + sum(pages.late_slots(state, len(req.output_ids) + new_tokens(req)))

        def _promise_rest(self, req: Any, slots_per_new_token: int) -> None:
            """Charge what a prompt that was cut still needs, so that nobody admitted beside it takes it."""
            rest = pages.round_up(prefill_len(req) - req.extend_end)
            self.memory_budget.total_offset += rest + slots_per_new_token * new_tokens(req)

        # --- rows ---

        def floor_chunked_tokens(self, trunc_len: int, remaining: int) -> int:
            length = super().floor_chunked_tokens(trunc_len, remaining)
            if self._current is None or trunc_len >= remaining:
                return length
            return chunk_len(length, remaining, last_rows(self._current), pages)

        def _select_prefill_admission(self, req: Any, **kwargs: Any) -> Any:
            admission = super()._select_prefill_admission(req, **kwargs)
            if isinstance(admission, AddReqResult) or not admission.is_chunked or self._current is None:
                return admission
            remaining = prefill_len(req) - admission.prefix_len
            length = chunk_len(admission.extend_len, remaining, last_rows(req), pages)
            return dataclasses.replace(admission, extend_len=length) if length else AddReqResult.OTHER

        def _completes(self, req: Any) -> bool:
            """Whether the chunk just added ends the prefill: the early layers will have seen all of it."""
            return req.extend_end == prefill_len(req)

        def _finish_step(self) -> None:
            """A request leaves this step unfinished: no other may be cut in it, so none is added."""
            self.rem_chunk_tokens = 0

        # --- the request that the last step left unfinished ---

        def add_chunked_req(self, req: Any) -> Any:
            state = pruned_state(req)
            self._current = None if state is None else req
            # Running requests may have taken what was promised to this one: it waits until they give it back, instead
            # of failing in the allocator. With nothing running it has the pool, which holds it.
            room = pages.round_down(int(self.cur_rem_tokens) - self.per_req_token_overhead)
            self.chunked_req_limit = room if self.chunked_req_limit is None else min(self.chunked_req_limit, room)
            budget = self.memory_budget.available_chunk_tokens(self.rem_chunk_tokens)
            if budget is None or self._next_chunk(req, min(budget, self.chunked_req_limit)) <= 0:
                self._finish_step()
                return req
            left = super().add_chunked_req(req)
            if state is None:
                self._late.take(req.extend_len)
            elif not self._completes(req):
                self._promise_rest(req, slots_per_new_token=1 + pages.late_rows(state))
            else:
                # Stock has charged the output's early slots, and the prompt's late slots are taken.
                self.memory_budget.total_offset += pages.late_rows(state) * new_tokens(req)
                left = None if self._late.advance(state, len(req.output_ids)) else req
            if left is not None:
                self._finish_step()
            return left

        def _next_chunk(self, req: Any, budget: int) -> int:
            """Length of a request's next chunk if the step has `budget` tokens for it; below 1: it must wait."""
            remaining = prefill_len(req) - req.prefix_len
            if pruned_state(req) is None:
                return min(budget, remaining)
            return chunk_len(budget, remaining, last_rows(req), pages)

        # --- requests from the queue ---

        def add_one_req(self, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
            if must_wait(req):
                return AddReqResult.CONTINUE  # it stays in the queue, and those behind it are considered
            before = len(self.can_run_list)
            if (state := pruned_state(req)) is None:
                result = self._add_dense(req, has_chunked_req, truncation_align_size)
            else:
                result = self._add_pruned(req, state, has_chunked_req, truncation_align_size)
            if len(self.can_run_list) > before:
                note_admitted(req, self.tree_cache)
            return result

        def _add_pruned(
            self, req: Any, state: RequestState, has_chunked_req: bool, truncation_align_size: int | None
        ) -> AddReqResult:
            self._current = req
            generated, before = len(req.output_ids), len(self.can_run_list)
            limit, remaining = self.rem_chunk_tokens, prefill_len(req) - req.prefix_len
            if limit is not None and self._next_chunk(req, limit) <= 0:
                return AddReqResult.OTHER
            if (limit is None or remaining <= limit) and before and not self._late.has_room(state, generated):
                return AddReqResult.OTHER
            result = super().add_one_req(req, has_chunked_req, truncation_align_size)
            if len(self.can_run_list) == before:
                return result
            if not self._completes(req):
                self._promise_rest(req, slots_per_new_token=1)  # the late ones are in the slot reserve
            elif self._late.advance(state, generated):
                return result
            self.new_chunked_req = req
            self._finish_step()
            return self.budget_state() if result is AddReqResult.CONTINUE else result

        def _add_dense(self, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
            """As stock, in a step whose chunk is no longer than what the late layers have left: a dense request has its
            rows in all layers."""
            self._current = None
            chunk, before = self.rem_chunk_tokens, len(self.can_run_list)
            hidden = 0 if chunk is None else chunk - self._late.cap(chunk)
            if chunk is not None:
                if hidden == chunk:
                    return AddReqResult.OTHER
                self.rem_chunk_tokens = chunk - hidden
            result = super().add_one_req(req, has_chunked_req, truncation_align_size)
            if hidden:
                self.rem_chunk_tokens += hidden
            if len(self.can_run_list) == before:
                return result
            self._late.take(req.extend_len)
            if self._completes(req):
                return result
            self._finish_step()  # cut at a page, it leaves tokens of the step that nobody may be cut in
            return self.budget_state() if result is AddReqResult.CONTINUE else result

    return ClaaPrefillAdder


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class",
        ("self",),
        "after",
        make_adder,
        "scheduler",
        "Admission must count late slots and late rows, and a last chunk must hold the whole window.",
    ),
)
