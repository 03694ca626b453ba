"""What the layers' wrapper and the attention backend ask of one forward that has late rows.

`LatePass` answers for a batch with pruned requests, `DecodeGraphPass` while a decode graph is captured.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from claa_sglang.forward.kept_rows import KeptView


class ActivePass(Protocol):
    """One forward, while it is the backend's `active`.

    views: the batch of the early layers, then one view per late level, None where it has no rows.
    kept: what generated tokens read in the configuration's `kept_layers`; None where they read what others do.
    """

    views: list[Any]
    kept: KeptView | None

    @property
    def has_late_rows(self) -> bool:
        """Whether any row reaches the late layers."""

    def needs_scores(self, level: int, layer_id: int) -> bool:
        """Whether `layer_id`, which runs at `level`, is scored for the prune at the end of that level."""

    def score(self, level: int, queries: Tensor, key_buffer: Tensor, scaling: float) -> None:
        """Score a layer for which `needs_scores` is true; arguments as for `Scorer.score`."""

    def boundary_rows(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(slots, hidden, residual) of the rows whose states after the first prune layer are stored."""

    def cross(
        self, level: int, hidden: Tensor, residual: Tensor, positions: Tensor, boundary: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """(hidden, residual, positions, batch) of the next level, made from those of `level`."""

    def last_tokens(self) -> list[tuple[Tensor, Tensor]]:
        """(slot it had, slot it has now), int64 `[1]` each, of prompts whose late prefill goes on."""

    def merge_scores(self, level: int) -> None:
        """Before `cross`, on every tensor-parallel rank: have the scores of all of them."""

    def agree_on_failures(self, error: Exception | None) -> None:
        """Raise `error`, or what another tensor-parallel rank failed with, if any did."""

    def leave(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden, residual) of the last level, back at the rows of the early layers."""
