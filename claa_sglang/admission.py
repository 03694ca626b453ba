"""What a pruned request costs in slots and rows, and where its chunks may end: host arithmetic for the scheduler."""

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


def late_prefill_len(state: RequestState, generated: int) -> int:
    """Rows of a pruned request's late prefill, and the late slots they take: the kept prompt tokens, and the tokens
    generated before a retraction."""
    return state.kept_counts[0] + generated


def max_new_tokens(capacity: int, state: RequestState) -> int:
    """Tokens a pruned request can generate with the pool for itself: each takes an early and a late slot. Below 0: the
    prompt alone does not fit."""
    return (capacity - state.prompt_tokens - state.kept_counts[0] - MARGIN) // 2


class LateRows:
    """Rows that the late layers may still take in one scheduling step.

    Stock bounds a step by its chunk: no layer sees more rows than that. The bound holds here at every level: the early
    layers have at most a chunk of rows, and so have the late ones. So a step that finishes a long prompt computes no
    more than a stock chunk does, and takes no more memory. What is left of a late prefill waits for the next step.

    Args:
        limit: rows of a chunk; None where prefill is not chunked, and nothing is bounded.
    """

    def __init__(self, limit: int | None) -> None:
        self.left = limit

    def cap(self, rows: int) -> int:
        """As many of `rows` as are left."""
        return rows if self.left is None else min(rows, self.left)

    def has_room(self, state: RequestState, generated: int) -> bool:
        """Whether a late prefill may start in what is left of this step: a part of it, or all where it has no parts."""
        rows = 1 if _has_parts(state) else late_prefill_len(state, generated)
        return self.cap(rows) == rows

    def take(self, rows: int) -> int:
        """Charge up to `rows`, as many as are left; returns how many."""
        taken = self.cap(rows)
        if self.left is not None:
            self.left -= taken
        return taken

    def advance(self, state: RequestState, generated: int) -> bool:
        """Plan the next part of a late prefill into this step; whether it is the last part."""
        total, done = late_prefill_len(state, generated), state.late_span[1]
        taken = self.take(total - done)
        end = done + taken if _has_parts(state) else total
        state.late_span = (done, end)
        return end == total


def _has_parts(state: RequestState) -> bool:
    """Whether a late prefill may take several steps. A second prune ranks all that the first kept, at once."""
    return len(state.steps) == 1
