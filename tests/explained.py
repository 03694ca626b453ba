"""What a report's `explain` must be: the reference's scores, and scores that the kept set follows from."""

from __future__ import annotations

from typing import Any

import pytest

from tests.reference_model import Expected

WINDOW = 32
# Places are logarithms of ranks: rows that float32 ranks otherwise than float64 have other places.
CLOSE = 1e-3
SWAPPED = 0.02  # share of rows


def check_explained(report: dict[str, Any], expected: Expected) -> None:
    """Every step's ranking and layers are the reference's, and what is kept are the best, the first and the window."""
    explained = report["explain"]
    steps = report.get("steps", [report])
    assert len(explained["steps"]) == len(steps)
    for number, (scores, step, choice) in enumerate(zip(explained["steps"], steps, expected.choices, strict=True)):
        visible = list(range(report["prompt_tokens"])) if number == 0 else steps[number - 1]["kept"]
        positions = scores.get("positions", visible[:-WINDOW])
        assert positions == visible[:-WINDOW] and ("positions" in scores) == (number > 0)
        assert scores["prune_layer"] == step["prune_layer"]
        same_scores(scores["scores"], choice.ranking)
        assert list(scores["layers"]) == [str(layer) for layer in step["score_layers"]]
        for layer, values in choice.layers.items():
            same_scores(scores["layers"][str(layer)], values)
        follows(step["kept"], positions, scores["scores"], visible[-WINDOW:])


def same_scores(found: list[float], wanted: list[float]) -> None:
    """Up to rows that are next to each other in rank and as good as equal."""
    assert len(found) == len(wanted)
    others = [i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pytest.approx(pair[1], CLOSE)]
    assert len(others) <= SWAPPED * len(found), others
    assert sorted(found) == pytest.approx(sorted(wanted), CLOSE, abs=CLOSE)


def follows(kept: list[int], positions: list[int], scores: list[float], tail: list[int]) -> None:
    """What is kept are the best by these scores, the first token and the window."""
    by_score = dict(zip(positions, scores, strict=True))
    chosen = [position for position in kept if position in by_score]
    assert kept == [*chosen, *tail]
    dropped = [score for position, score in by_score.items() if position not in set(kept)]
    if chosen:
        assert chosen[0] == positions[0]
    assert min([by_score[p] for p in chosen[1:]], default=max(dropped)) >= max(dropped, default=-1e9)
