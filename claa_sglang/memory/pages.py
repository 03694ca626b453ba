"""Pages: SGLang hands out KV slots in pages of `--page-size`, and a request's row lists its tokens page after page.

With pages of one token, the row of a later prune step lists some of the first step's late slots. With larger ones it
cannot, as kept tokens lie scattered over those pages: then the row of every prune step has pages of its own.
"""

from __future__ import annotations

from typing import NamedTuple

from claa_sglang.requests.state import RequestState


class Pages(NamedTuple):
    """Arithmetic of pages. size: tokens of one."""

    size: int

    def round_up(self, tokens: int) -> int:
        """Slots of the pages that `tokens` take."""
        return -(-tokens // self.size) * self.size

    def round_down(self, tokens: int) -> int:
        """Tokens of the pages that `tokens` fill."""
        return tokens // self.size * self.size

    @property
    def are_shared(self) -> bool:
        """Whether the rows of all prune steps list the first step's late slots."""
        return self.size == 1

    def late_rows(self, state: RequestState) -> int:
        """Late rows of a pruned request that have slots of their own: what a generated token takes beside its early
        slot, on the average."""
        return 1 if self.are_shared else len(state.plan.kept_counts)

    def late_slots(self, state: RequestState, behind: int) -> list[int]:
        """Slots of each of these rows that lists the kept prompt tokens and `behind` tokens after them."""
        return [self.round_up(kept + behind) for kept in state.plan.kept_counts[: self.late_rows(state)]]


ONE_TOKEN = Pages(1)
