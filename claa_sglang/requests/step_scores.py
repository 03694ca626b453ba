"""How the tokens of one prompt scored at one prune, kept for a request that asks to be explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StepScores:
    """Scores of one prune of one request, on the device that ranked. M tokens are ranked: those visible, no window.

    Attributes:
        ranking: fp32 `[M]`, what the tokens were chosen by; higher is better.
        layers: fp32 `[M]` of each scored layer, in their order: the ranking that it alone would give. Empty for a
            ranker that looks at no layer.
        looked_at: fp32 `[N - explain_window]` of each scored layer: the weight that a token has in the attention of the
            last `explain_window` tokens, the mean over these and the query heads. Empty where nobody asked.
    """

    ranking: Tensor
    layers: Sequence[Tensor]
    looked_at: Sequence[Tensor] = field(default_factory=tuple)
