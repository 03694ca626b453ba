"""What `benchmarks.load` says of positions that are kept under load and not alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.load import margin_of
from tests import tiny_models
from tests.reference_model import ReferenceModel


@pytest.mark.parametrize("keep_rate", [0.1, 0.5])
def test_the_margin_is_the_reference_s(tiny_model: Callable[[str], Path], keep_rate: float) -> None:
    path, prompt, layers = tiny_model("llama"), tiny_models.prompt(400), [1, 3]
    reference = ReferenceModel(path, prune_layer=3, score_layers=layers).pruned(prompt, [7], keep_rate)
    margin = margin_of(path, prompt, layers, len(reference.kept[0]))
    assert margin == pytest.approx(reference.margin, abs=1e-5) and 0 < margin < 1


def test_nothing_dropped_has_no_margin(tiny_model: Callable[[str], Path]) -> None:
    for kept in (60, 32, 33):  # all, the window, and the first token beside it
        assert margin_of(tiny_model("llama"), tiny_models.prompt(60), [3], kept) == float("inf")
