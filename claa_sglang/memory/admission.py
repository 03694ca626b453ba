"""What a pruned request costs in slots and rows, and where its chunks may end: host arithmetic for the scheduler."""

from __future__ import annotations

from claa_sglang.memory.pages import ONE_TOKEN, Pages
from claa_sglang.requests.state import RequestState

# Slots left free beside a request that has the pool for itself, and a page: stock leaves a page and one, and pruned
# tokens take two slots each, or more.
MARGIN = 7


def chunk_len(budget: int, remaining: int, window: int, pages: Pages = ONE_TOKEN) -> int:
    """Length of the next chunk of a prompt with `remaining` tokens to go, so that the last chunk has the whole window,
    and any other ends with a page, as it began.

    Args:
        budget: tokens the step has left, > 0.

    Returns:
        At most min(budget, remaining). 0 means: wait for a step with more budget, because what would remain after any
        chunk that fits is shorter than the window.
    """
    if budget >= remaining:
        return remaining
    return pages.round_down(max(0, min(budget, remaining - window)))


def late_prefill_len(state: RequestState, generated: int) -> int:
    """Rows of a pruned request's late prefill: the kept prompt tokens, and the tokens generated before a retraction."""
    return state.plan.kept_counts[0] + generated


def max_new_tokens(capacity: int, state: RequestState, pages: Pages) -> int:
    """Tokens a pruned request can generate with the pool for itself: each takes an early and a late slot, or more.
    Below 0: the prompt alone does not fit."""
    rows = 1 + pages.late_rows(state)
    prompt = state.plan.prompt_tokens + sum(state.plan.kept_counts[: rows - 1])
    return (capacity - prompt - MARGIN - pages.size - rows * (pages.size - 1)) // rows


class LateRows:
    """Rows that the late layers may still take in one scheduling step, after each prune step.

    Stock bounds a step by its chunk: no layer sees more rows than that. The bound holds here at every level: the early
    layers have at most a chunk of rows, and so have those after each prune. So a step that finishes a long prompt
    computes no more than a stock chunk does, and takes no more memory. What is left of a late prefill waits for the
    next step.

    Args:
        limit: rows of a chunk, at least the window; None where prefill is not chunked, and nothing is bounded.
        num_steps: prune steps of the configuration.
        window: tokens whose queries rank.
    """

    def __init__(self, limit: int | None, num_steps: int, window: int) -> None:
        self.left = None if limit is None else [limit] * num_steps
        self._window = window

    def cap(self, rows: int) -> int:
        """As many of `rows` as are left at every level."""
        return rows if self.left is None else min(rows, *self.left)

    def take(self, rows: int) -> int:
        """Charge up to `rows` of a dense request, which has them at every level; returns how many are charged."""
        taken = self.cap(rows)
        if self.left is not None:
            self.left = [left - taken for left in self.left]
        return taken

    def has_room(self, state: RequestState, generated: int) -> bool:
        """Whether a late prefill may start in what is left of this step."""
        return self._part(state, 0, late_prefill_len(state, generated)) > 0

    def advance(self, state: RequestState, generated: int) -> bool:
        """Plan the next part of a late prefill into this step; whether it is the last part."""
        spans = state.progress.late_spans
        for step, kept in enumerate(state.plan.kept_counts):
            total, done = kept + generated, spans[step][1]
            taken = self._part(state, step, total - done)
            if self.left is not None:
                self.left[step] -= taken
            spans[step] = (done, done + taken)
            if done + taken < total:
                return False
        return True

    def _part(self, state: RequestState, step: int, rows: int) -> int:
        """Of the `rows` to go after a prune step, how many the next part has. The part that ends them has the whole
        window if another prune follows, whose ranking it asks."""
        if self.left is None:
            return rows
        if step == len(state.plan.kept_counts) - 1:
            return min(rows, self.left[step])
        return chunk_len(self.left[step], rows, self._window)
