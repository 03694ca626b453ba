"""A pruned prompt's last steps: the window is computed anew on a hit, and a long late prefill takes several steps.

SGLang lets a request take several steps through its *chunks*. A late prefill that is longer than a chunk uses that: the
step that runs the last tokens through the early layers ranks the prompt and computes a first part of the late layers.
On record, its chunk ended where its last page begins: one token earlier with pages of one token. So the request stays
the one that SGLang keeps between chunks, its next step is that page once more with the next part, and the step with the
last part ends the prompt. What the early layers compute of that page again is thrown away, as a few rows round
otherwise than among many: KV and boundary states are copied from the slots it had, which late slots own meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch

from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.memory import late_slots_of
from claa_sglang.patches.requests import pruned_state


def reprefill_window(original: Any, self: Any, req: Any = None) -> int:
    """AROUND: a pruned request recomputes at least its window, whose queries rank the prompt.

    So it does what it had generated over kept tokens before a retraction: a prompt of the same tokens has other KV.
    """
    tail = original(self, req)
    if (state := pruned_state(req)) is None:
        return tail
    own = len(req.output_ids) if state.plan.decode_dense_layers is not None else 0
    return max(tail, state.last_rows(attached.window.of(self)), own)


def cache_prompt_alone(original: Any, self: Any, req: Any, *, up_to: int, **kwargs: Any) -> Any:
    """AROUND `UnifiedRadixCache.checkpoint_into_tree`: what was generated over kept tokens is not for others, whose
    prompts read everything."""
    state = pruned_state(req)
    if state is not None and state.plan.decode_dense_layers is not None:
        up_to = min(up_to, state.plan.prompt_tokens)
    return original(self, req, up_to=up_to, **kwargs)


def withhold_last_page(self: Any, req: Any) -> None:
    """BEFORE `Scheduler.stash_chunked_request`: a request whose late prefill goes on has its last page still to come.

    Only a request that is unfinished comes here; one whose chunk reached its end has late rows to come.
    """
    if pruned_state(req) is None or req.extend_end < len(req.full_untruncated_fill_ids):
        return
    late_slots, row, end = late_slots_of(self.req_to_token_pool), req.kv.req_pool_idx, req.extend_end
    last = late_slots.pages.round_down(end - 1)
    late_slots.set_aside(row, self.req_to_token_pool.req_to_token[row, last:end].to(torch.int64))
    req.extend_end = req.kv.kv_allocated_len = req.kv.kv_committed_len = last
    if not req.retracted_stain:
        req.already_computed = last  # else these tokens would count as a cache hit, negatively


HOOKS = (
    Hook(
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree",
        ("self", "req", "up_to", "kwargs"),
        "around",
        cache_prompt_alone,
        "scheduler",
        "KV of tokens generated over kept ones must not be found by prompts.",
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
        "sglang.srt.managers.scheduler.Scheduler.stash_chunked_request",
        ("self", "req"),
        "before",
        withhold_last_page,
        "scheduler",
        "A late prefill longer than a chunk takes several steps, so that no step is longer than a stock chunk.",
    ),
)
