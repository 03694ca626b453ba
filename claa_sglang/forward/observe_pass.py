"""One prefill forward of a server that observes: scores of the layers that rank, and what a prune would keep.

The batch runs as stock runs it, in the stock attention; nothing here may change an answer, so what fails is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from claa_sglang.config.config import ClaaConfig
from claa_sglang.forward.batch_plan import Segment
from claa_sglang.forward.scorers import Scored, Scorer, make_scorer
from claa_sglang.ranking.selection import select

logger = logging.getLogger(__name__)


class ObservePass:
    """State of one forward.

    Args:
        segments: the requests that are ranked in it, of which every prompt token and every row of the window is there.
        table: the request table.
        config: the server's configuration, with one prune step.
    """

    kept = None

    def __init__(self, segments: Sequence[Segment], table: Tensor, config: ClaaConfig) -> None:
        self._scored = [s for s in segments if _drops(s)]
        self._segments = self._scored  # without those that failed
        self._window = config.window
        self._score_layers = config.steps[0].score_layers
        self._scorer: Scorer | None = None
        self._make = lambda scored: make_scorer(scored, table, config)
        for segment in segments:
            if not _drops(segment):
                _state(segment).progress.kept[0] = torch.arange(segment.seq_len, device=table.device)

    def needs_scores(self, _level: int, layer_id: int) -> bool:
        """Whether `layer_id` ranks."""
        return bool(self._segments) and layer_id in self._score_layers

    def score(self, _level: int, queries: Tensor, key_buffer: Tensor, scaling: float) -> None:
        """Score the prompt tokens of every request; arguments as for `Scorer.score`."""

        def score() -> None:
            if self._scorer is None:
                self._scorer = self._make(
                    [Scored(s.request, _state(s), s.end - self._window, s.row, s.seq_len) for s in self._scored]
                )
            self._scorer.score(queries, key_buffer, scaling)

        self._attempt(score)

    def conclude(self) -> None:
        """Once, after the last layer that ranks: what would be kept of each request."""
        segments, scorer = self._segments, self._scorer
        if scorer is None:
            return

        def choose() -> None:
            for s in segments:
                state, ranking = _state(s), scorer.ranking(s.request)
                state.progress.kept[0] = select(ranking, s.seq_len, state.plan.kept_counts[0], self._window)

        self._attempt(choose)
        self._segments, self._scorer = [], None

    def _attempt(self, work: Callable[[], Any]) -> None:
        """Do it. What fails leaves its requests without a ranking, and their answers as they are."""
        try:
            work()
        except Exception:
            logger.exception("CLAA could not observe %d requests", len(self._segments))
            self._segments = []
        # A scorer ends a request that it cannot score; here the request goes on.
        failed = [s for s in self._scored if _state(s).progress.error is not None]
        for segment in failed:
            _state(segment).progress.error = None
        self._segments = [s for s in self._segments if s not in failed]


def _state(segment: Segment) -> Any:
    assert segment.state is not None
    return segment.state


def _drops(segment: Segment) -> bool:
    return _state(segment).plan.kept_counts[0] < segment.seq_len
