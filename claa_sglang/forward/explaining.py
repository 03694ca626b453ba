"""What the last tokens of a prompt look at, for a request that asks: their attention in the layers that rank.

The ranking keeps its own window. This is another range of the same queries, over the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from claa_sglang.forward.scorers import Scored
from claa_sglang.kernels.scoring import window_shares
from claa_sglang.memory.kv_rows import gather
from claa_sglang.requests.state import contain


class LookedAt:
    """Of one prune in one forward.

    Args:
        requests: those of it that ask, and how many rows of each are in this forward.
        table: the request table.
        window: tokens that rank.
    """

    def __init__(self, requests: Sequence[tuple[Scored, int]], table: Tensor, window: int) -> None:
        self._requests, self._table, self._window = requests, table, window
        self._layers: dict[int, list[Tensor]] = {scored.request: [] for scored, _ in requests}

    @classmethod
    def of(cls, requests: Sequence[tuple[Scored, int]], table: Tensor, window: int) -> LookedAt | None:
        """Of those of `requests` who ask; None if nobody does."""
        asking = [pair for pair in requests if pair[0].state.plan.options.explain_window is not None]
        return cls(asking, table, window) if asking else None

    def add(self, queries: Tensor, key_buffer: Tensor, scaling: float) -> None:
        """One more layer; arguments as for `Scorer.score`. A failure ends the request it concerns."""
        for scored, rows in self._requests:
            with contain([scored.state], "explaining its prompt"):
                count = scored.state.plan.options.explain_window
                assert count is not None
                if count > rows:  # admission keeps the last chunk long enough; rows before these are another request's
                    raise RuntimeError(f"explain_window is {count} tokens, and this step has {rows} of the prompt")
                end = scored.first_row + self._window
                keys = gather(key_buffer, self._table[scored.table_row, : scored.tokens], queries.dtype)
                self._layers[scored.request].append(window_shares(queries[end - count : end], keys, scaling=scaling))

    def layers(self, request: int) -> list[Tensor]:
        """fp32 `[tokens - explain_window]` for each layer: `kernels.scoring.window_shares`. None if nobody asked."""
        return self._layers.get(request, [])
