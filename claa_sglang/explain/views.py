"""What the selector of the page offers: a number for each prompt token, of a prune, of a layer, of the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from claa_sglang.explain.asking import Explained
from claa_sglang.explain.looked_at import mean_of

RANKING = "ranking"
# Share of the tokens with a value, best first, that has a level, and its class; what has no value has NO_LEVEL.
LEVELS = ((0.01, "q4"), (0.05, "q3"), (0.2, "q2"), (0.5, "q1"), (1.0, "q0"))
NO_LEVEL = "qn"


class View(NamedTuple):
    """One number for each prompt token. key: in `#layer=key`. about: what the number is, in a sentence."""

    key: str
    label: str
    about: str
    values: Sequence[float | None]


def make_views(found: Explained) -> list[View]:
    """The ranking first, then its layers, further prunes, and what the answer looked at."""
    tokens, views = found.report["prompt_tokens"], []
    for number, step in enumerate(found.report["explain"]["steps"], start=1):
        which = "" if number == 1 else f" of prune {number}"
        key = RANKING if number == 1 else f"{RANKING}-{number}"
        about = "What the tokens were chosen by: the best were kept."
        views.append(View(key, f"ranking{which}", about, _spread(step, step["scores"], tokens)))
        for layer, values in step["layers"].items():
            about = f"How layer {layer} alone would rank the tokens."
            views.append(View(layer, f"layer {layer}", about, _spread(step, values, tokens)))
    if found.looked_at:
        about = "Share of the answer's attention, the mean over the layers that rank."
        mean = [float(f"{share:.4g}") for share in mean_of(found.looked_at)]
        views.append(View("answer", "looked at by the answer", about, mean))
        for layer, shares in found.looked_at.items():
            about = f"Share of the answer's attention in layer {layer}."
            views.append(View(f"answer-{layer}", f"looked at by the answer, layer {layer}", about, list(shares)))
    return views


def _spread(step: Mapping[str, Any], values: Sequence[float | None], tokens: int) -> list[float | None]:
    """The values at their positions in the prompt; None where a token has none."""
    found: list[float | None] = [None] * tokens
    for position, value in zip(step.get("positions", range(len(values))), values, strict=True):
        found[position] = value
    return found


def levels(values: Sequence[float | None]) -> list[str]:
    """The class of each token. Equal values can have two levels: of these the earlier token counts as better, as where
    tokens are chosen."""
    order = sorted((i for i, v in enumerate(values) if v is not None), key=lambda i: (-(values[i] or 0.0), i))
    found = [NO_LEVEL] * len(values)
    for place, position in enumerate(order, start=1):
        found[position] = next(name for share, name in LEVELS if place <= max(1.0, share * len(order)) or share == 1.0)
    return found
