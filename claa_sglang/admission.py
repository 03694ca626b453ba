"""What a pruned request costs in slots, and where its chunks may end: host-side arithmetic for the scheduler."""

from __future__ import annotations

from claa_sglang.state import RequestState

# Slots left free beside a request that has the pool for itself: stock leaves two, and pruned tokens take two each.
MARGIN = 8


def chunk_len(budget: int, remaining: int, window: int) -> int:
    """Length of the next chunk of a prompt with `remaining` tokens to go, so that the last chunk has the whole window.

    Args:
        budget: tokens the step has left, > 0.

    Returns:
        At most min(budget, remaining). 0 means: wait for a step with more budget, because what would remain after any
        chunk that fits is shorter than the window.
    """
    if budget >= remaining:
        return remaining
    return max(0, min(budget, remaining - window))


def late_prompt_slots(state: RequestState, generated: int) -> int:
    """Late slots the prefill of a pruned request takes: kept prompt tokens, and those generated before a retraction."""
    return state.kept_counts[0] + generated


def max_new_tokens(capacity: int, state: RequestState) -> int:
    """Tokens a pruned request can generate with the pool for itself: each takes an early and a late slot. Below 0: the
    prompt alone does not fit."""
    return (capacity - state.prompt_tokens - state.kept_counts[0] - MARGIN) // 2
