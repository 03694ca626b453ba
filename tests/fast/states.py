"""States of requests for fast tests, without a scheduler."""

from __future__ import annotations

from typing import Any

import torch

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState

STEP = PruneStep(prune_layer=3, keep_rate=0.25, score_layers=(1, 2, 3))
CONFIG = ClaaConfig(steps=(STEP,), num_layers=8, window=8, min_prompt_tokens=32)
SECOND = PruneStep(prune_layer=5, keep_rate=0.125, score_layers=(4, 5))


def pruned(tokens: int = 80, config: ClaaConfig = CONFIG, **options: Any) -> RequestState:
    state = RequestState.pruned_request(RequestOptions(**options), config, tokens)
    for index, count in enumerate(state.plan.kept_counts):
        state.progress.kept[index] = torch.arange(tokens - count, tokens)
    state.progress.late_computed_tokens = state.plan.kept_counts[0]
    return state
