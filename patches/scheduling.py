"""Scheduler: admission counts late slots, chunks end where the window allows, own invariants are checked."""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder

from claa_sglang.admission import chunk_len, late_prompt_slots, max_new_tokens
from claa_sglang.arguments import config_of
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.memory import late_slots_of
from claa_sglang.patches.requests import make_dense
from claa_sglang.state import RequestState


def pruned_state(req: Any) -> RequestState | None:
    """The state of a pruned request; None for any other, which takes the stock path."""
    state = getattr(req, "claa", None)
    return state if state is not None and state.pruned else None


def new_tokens(req: Any) -> int:
    """Tokens the request may still generate, clipped as stock's admission clips them."""
    return min(max(req.sampling_params.max_new_tokens - len(req.output_ids), 0), CLIP_MAX_NEW_TOKENS)


def make_adder(base: type[PrefillAdder], scheduler: Any) -> type[PrefillAdder]:
    """A prefill adder that charges late slots and keeps a prompt's last chunk at least as long as the window.

    Stock asks for the class at every step; it is made once.
    """
    if getattr(scheduler, "claa_adder", None) is None:
        scheduler.claa_adder = _adder(base, scheduler)
    return scheduler.claa_adder


def _adder(base: type[PrefillAdder], scheduler: Any) -> type[PrefillAdder]:
    window = config_of(scheduler.server_args).window
    slots = late_slots_of(scheduler.req_to_token_pool)

    class ClaaPrefillAdder(base):
        _current: Any = None  # the request being added

        def _get_running_request_total_token_offset(self, req: Any) -> int:
            offset = super()._get_running_request_total_token_offset(req)
            return offset if pruned_state(req) is None else 2 * offset

        def _request_slot_reserve_for_req(self, req: Any, *, extend_input_len: int | None = None) -> int:
            reserve = super()._request_slot_reserve_for_req(req, extend_input_len=extend_input_len)
            state = pruned_state(req)
            if state is None or slots.reserved(req.kv.req_pool_idx):
                return reserve
            return reserve + late_prompt_slots(state, len(req.output_ids)) + new_tokens(req)

        def floor_chunked_tokens(self, trunc_len: int, remaining: int) -> int:
            length = super().floor_chunked_tokens(trunc_len, remaining)
            if pruned_state(self._current) is None or trunc_len >= remaining:
                return length
            return chunk_len(length, remaining, window)

        def _promise_rest(self, req: Any, slots_per_new_token: int) -> None:
            """Charge what a prompt that was cut still needs, so that nobody admitted beside it takes it."""
            rest = len(req.full_untruncated_fill_ids) - req.extend_end
            self.memory_budget.total_offset += rest + slots_per_new_token * new_tokens(req)
            # A shortened chunk leaves budget over; a second prompt must not be cut in the same step.
            self.rem_chunk_tokens = 0

        def add_chunked_req(self, req: Any) -> Any:
            if pruned_state(req) is None:
                return super().add_chunked_req(req)
            self._current = req
            remaining = len(req.full_untruncated_fill_ids) - req.prefix_len
            budget = self.memory_budget.available_chunk_tokens(self.rem_chunk_tokens)
            if budget is not None and chunk_len(budget, remaining, window) == 0:
                return req  # parked until running requests give memory back
            left = super().add_chunked_req(req)
            if left is not None:
                self._promise_rest(req, slots_per_new_token=2)
            else:
                # Stock has charged the output's early slots, and the prompt's late slots are taken.
                self.memory_budget.total_offset += new_tokens(req)
            return left

        def add_one_req(self, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
            if pruned_state(req) is None:
                self._current = None
                return super().add_one_req(req, has_chunked_req, truncation_align_size)
            self._current = req
            remaining = len(req.full_untruncated_fill_ids) - req.prefix_len
            if self.rem_chunk_tokens is not None and chunk_len(self.rem_chunk_tokens, remaining, window) == 0:
                return AddReqResult.OTHER
            result = super().add_one_req(req, has_chunked_req, truncation_align_size)
            if self.new_chunked_req is req:
                self._promise_rest(req, slots_per_new_token=1)  # the late ones are in the slot reserve
                if result is AddReqResult.CONTINUE:
                    result = self.budget_state()
            return result

        def _select_prefill_admission(self, req: Any, **kwargs: Any) -> Any:
            admission = super()._select_prefill_admission(req, **kwargs)
            if isinstance(admission, AddReqResult) or not admission.is_chunked or pruned_state(req) is None:
                return admission
            remaining = len(req.full_untruncated_fill_ids) - admission.prefix_len
            length = chunk_len(admission.extend_len, remaining, window)
            return dataclasses.replace(admission, extend_len=length) if length else AddReqResult.OTHER

    return ClaaPrefillAdder


def check_decode_capacity(
    original: Any,
    self: Any,
    *,
    num_tokens: int,
    tree_cache: Any,
    requests: Any = None,
    spec_algorithm: Any = None,
) -> bool:
    """AROUND: the next decode step takes a late slot more for every pruned request; too few lead to retraction."""
    late = sum(pruned_state(req) is not None for req in requests or ())
    return original(
        self, num_tokens=num_tokens + late, tree_cache=tree_cache, requests=requests, spec_algorithm=spec_algorithm
    )


def limit_new_tokens(result: Any, self: Any, req: Any) -> Any:
    """AFTER `init_req_max_new_tokens`: a pruned request's output must fit twice, early and late.

    A prompt that fits the pool only without late slots runs dense: stock's own checks decide about that.
    """
    state = pruned_state(req)
    if state is None:
        return result
    limit = max_new_tokens(self.max_total_num_tokens, state)
    if limit < 1:
        need = state.prompt_tokens + state.kept_counts[0]
        make_dense(req, f"{need} early and late KV slots do not fit a pool of {self.max_total_num_tokens}")
        return result
    params = req.sampling_params
    params.max_new_tokens = min(params.max_new_tokens, limit)
    params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)
    return result


def reprefill_window(original: Any, self: Any, req: Any = None) -> int:
    """AROUND: a pruned request recomputes at least its window, whose queries rank the prompt."""
    tail = original(self, req)
    return tail if pruned_state(req) is None else max(tail, self.claa_window)


def count_late_slots(result: tuple[int, int], self: Any) -> tuple[int, int]:
    """AFTER `_get_total_uncached_sizes`: late slots are held by requests, not leaked."""
    full, swa = result
    return full + late_slots_of(self.req_to_token_pool).held, swa


def check_idle(result: Any, self: Any) -> Any:
    """AFTER `_check_req_pool`, which runs when nothing does: every late slot is back."""
    held = late_slots_of(self.req_to_token_pool).held
    if held:
        self._report_leak("CLAA late slots", f"{held} late slots are held while the server is idle")
    return result


_CHECKER = "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"
HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class",
        ("self",),
        "after",
        make_adder,
        "scheduler",
        "Admission must count late slots, and a last chunk must hold the whole window.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        ("self", "req"),
        "after",
        limit_new_tokens,
        "scheduler",
        "A generated token of a pruned request takes two slots.",
    ),
    Hook(
        "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.check_decode_capacity",
        ("self", "num_tokens", "tree_cache", "requests", "spec_algorithm"),
        "around",
        check_decode_capacity,
        "scheduler",
        "A shortage of late slots must retract, as any other shortage does.",
    ),
    Hook(
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.swa_reprefill_tail_tokens",
        ("self", "req"),
        "around",
        reprefill_window,
        "scheduler",
        "A prefix hit must leave the window to be computed, whose queries rank the prompt.",
    ),
    Hook(
        f"{_CHECKER}._get_total_uncached_sizes",
        ("self",),
        "after",
        count_late_slots,
        "scheduler",
        "SGLang's conservation check must see late slots.",
    ),
    Hook(
        f"{_CHECKER}._check_req_pool",
        ("self",),
        "after",
        check_idle,
        "scheduler",
        "Nothing may hold a late slot when the server is idle.",
    ),
)
