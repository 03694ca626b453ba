"""What fits the pool: a pruned request's output takes an early and a late slot a token."""

from __future__ import annotations

from typing import Any

from claa_sglang.memory.admission import max_new_tokens
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.memory import late_slots_of
from claa_sglang.patches.requests import make_dense, pruned_state
from claa_sglang.requests.dense_rules import CAPACITY


def check_decode_capacity(
    original: Any,
    self: Any,
    *,
    num_tokens: int,
    tree_cache: Any,
    requests: Any = None,
    spec_algorithm: Any = None,
) -> bool:
    """AROUND: the next decode step takes a late slot more for every pruned request, or the page it begins; too few lead
    to retraction."""
    late = 0
    if requests and tree_cache is not None:
        slots = late_slots_of(tree_cache.req_to_token_pool)
        late = sum(slots.need_of_next_token(req.kv.req_pool_idx) for req in requests if req.kv.holds_kv)
    return original(
        self, num_tokens=num_tokens + late, tree_cache=tree_cache, requests=requests, spec_algorithm=spec_algorithm
    )


def limit_new_tokens(original: Any, self: Any, req: Any) -> Any:
    """AROUND `init_req_max_new_tokens`, which cuts an output to what fits beside the prompt: pruned, it must fit early
    and late.

    An output of a given length that fits a dense request alone is not cut: the request runs dense. So does a prompt
    that does not fit with its late slots. What does not fit dense either is stock's to refuse.
    """
    asked = req.sampling_params.max_new_tokens  # None: as many as fit
    result = original(self, req)
    state = pruned_state(req)
    if state is None:
        return result
    params = req.sampling_params
    capacity, pages = self.max_total_num_tokens, late_slots_of(self.req_to_token_pool).pages
    limit = max_new_tokens(capacity, state, pages)
    if limit < 1 or (asked is not None and limit < params.max_new_tokens):
        behind = 0 if limit < 1 else params.max_new_tokens
        need = pages.round_up(state.plan.prompt_tokens + behind) + sum(pages.late_slots(state, behind))
        make_dense(req, CAPACITY.format(need=need, capacity=capacity))
        return result
    state.decision.dense_new_tokens = params.max_new_tokens, params.min_new_tokens
    params.max_new_tokens = min(params.max_new_tokens, limit)
    params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)
    return result


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        ("self", "req"),
        "around",
        limit_new_tokens,
        "scheduler",
        "A generated token of a pruned request takes an early and a late slot.",
    ),
    Hook(
        "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.check_decode_capacity",
        ("self", "num_tokens", "tree_cache", "requests", "spec_algorithm"),
        "around",
        check_decode_capacity,
        "scheduler",
        "A shortage of late slots must retract, as any other shortage does.",
    ),
)
