"""A made-up explained prompt, with everything in it that a page must stand."""

from __future__ import annotations

from typing import Any

from claa_sglang.explain.asking import Explained
from claa_sglang.explain.texts import TokenText

WINDOW = 3
NASTY = '</script><img src=x onerror="alert(1)">'
TEXTS = (
    "<s>",
    " Hello",
    NASTY,
    "\n\n",
    "\u202eevil",
    "\x00\x07",
    "é",
    "",
    " &amp;",
    " needle",
    " 42",
    " tail",
    "&",
    "\t",
)
KEPT = [0, 2, 6, 9, 10, 11, 12, 13]
SCORES = [0.5, 1.5, 9.0, 0.25, None, 0.1, 3.0, 2.0, 1.0, 8.0, 7.0]
LOOKED_AT = [0.5, 0.0, 0.01, 0.0, 0.02, 0.0, 0.0, 0.0, 0.0, 0.2, 0.1, 0.01, 0.01, 0.05]


def tokens() -> list[TokenText]:
    parts = {6: "é", 7: "é"}
    return [TokenText(100 + i, text, parts.get(i, "")) for i, text in enumerate(TEXTS)]


def explained(*, prunes: int = 1, answer: str = f"It is 42. {NASTY}", looking: int = 4) -> Explained:
    """prunes: 1, or 2, of which the second keeps half of what the first kept. looking: 0 for an empty answer."""
    first = step(21, 8 / 14, KEPT, [18, 21])
    report: dict[str, Any] = {"pruned": True, "prompt_tokens": len(TEXTS), "ranker": "claa", **first}
    layers = {"18": SCORES, "21": SCORES[::-1]}
    steps: list[dict[str, Any]] = [{"prune_layer": 21, "scores": SCORES, "layers": layers}]
    if prunes == 2:
        report["steps"] = [first, step(25, 0.3, [0, 9, 11, 12, 13], [25])]
        second = [1.0, 2.0, 3.0, 9.0, 4.0]
        steps.append({"prune_layer": 25, "positions": KEPT[:-3], "scores": second, "layers": {"25": second}})
    report["explain"] = {"steps": steps}
    return Explained(
        info={
            "model_path": "some/<model>",
            "version": "0.5.23",
            "claa": {"config": {"num_layers": 30}, "scorer": {"scorer": "torch"}},
        },
        tokens=tokens(),
        answer=answer,
        answer_tokens=looking,
        report=report,
        looking=looking,
        looked_at={"18": LOOKED_AT, "21": LOOKED_AT[::-1]} if looking else {},
    )


def step(layer: int, rate: float, kept: list[int], layers: list[int]) -> dict[str, Any]:
    return {"prune_layer": layer, "keep_rate": rate, "kept": kept, "kept_tokens": len(kept), "score_layers": layers}
