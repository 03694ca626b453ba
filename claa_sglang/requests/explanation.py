"""What a request that asks `explain` is told: how each token of its prompt scored, as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from claa_sglang.requests.state import RequestState

DIGITS = 4  # of a reported score
DENSE = "the request ran dense, see reason"
OBSERVED = "a server that observes explains nothing: start it without --claa-mode observe"
GIVEN = "the request gave the positions to keep, and nothing was ranked"
WHOLE = "every token is kept, and nothing was ranked"
NOT_YET = "the request ended before its prompt was ranked"


def explanation(state: RequestState) -> dict[str, Any]:
    """`explain` of a report: scores of every prune, or under `none` why there are none.

    Copies the scores from the device: one wait for each, for requests that ask.
    """
    plan, found = state.plan, state.progress.explained
    if not state.pruned:
        return {"none": OBSERVED if state.observed else DENSE}
    if plan.options.keep is not None:
        return {"none": GIVEN}
    if not any(found):
        return {"none": WHOLE if plan.kept_counts[0] == plan.prompt_tokens else NOT_YET}
    steps = []
    for index, (step, scores) in enumerate(zip(plan.steps, found, strict=True)):
        if scores is None:
            break
        ranked = scores.ranking.shape[0]
        before = None if index == 0 else state.progress.kept[index - 1]
        steps.append(
            {
                "prune_layer": step.prune_layer,
                **({} if before is None else {"positions": before[:ranked].tolist()}),
                "scores": rounded(scores.ranking),
                "layers": _by_layer(step.score_layers, scores.layers),
            }
        )
    explained: dict[str, Any] = {"steps": steps}
    if found[0] is not None and found[0].looked_at:
        looked_at = _by_layer(plan.steps[0].score_layers, found[0].looked_at)
        explained["looked_at"] = {"window": plan.options.explain_window, "layers": looked_at}
    return explained


def _by_layer(layers: Sequence[int], scores: Sequence[Tensor]) -> dict[str, list[float | None]]:
    """Of a ranker that looks at no layer, or of one that failed in some, what there is."""
    return {str(layer): rounded(values) for layer, values in zip(layers, scores, strict=False)}


def rounded(values: Tensor, digits: int = DIGITS) -> list[float | None]:
    """The values at so many significant digits, as JSON has them; None for what is not finite.

    values: floats `[n]`, on any device. What is below 1e-18 in magnitude has fewer digits.
    """
    import numpy as np

    given = values.detach().cpu().double().numpy()
    finite = np.isfinite(given)
    given = np.where(finite, given, 0.0)
    magnitude = np.floor(np.log10(np.where(given == 0, 1.0, np.abs(given))))
    # A power of ten up to 22 is exact, so that the quotient is the double nearest to the decimal, which prints short.
    power = np.clip(digits - 1 - magnitude, 0, 22)
    found: list[float | None] = (np.round(given * 10.0**power) / 10.0**power).tolist()
    if not finite.all():
        found = [value if ok else None for value, ok in zip(found, finite, strict=True)]
    return found
