"""`explain` of a report: rounded scores of each prune, or why there are none."""

from __future__ import annotations

import json

import msgspec
import pytest
import torch

from claa_sglang.requests import explanation
from claa_sglang.requests.explanation import rounded
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.report import build_report
from claa_sglang.requests.state import RequestState
from claa_sglang.requests.step_scores import StepScores
from tests.fast.states import CONFIG, SECOND, STEP, pruned


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1.23456, "1.235"),
        (-0.000123449, "-0.0001234"),
        (9.9996, "10.0"),
        (0.0, "0.0"),
        (1e-9 / 3, "3.333e-10"),
        (-1.0, "-1.0"),
        (5432.1, "5432.0"),
        (123456.0, "123456.0"),
    ],
)
def test_four_digits_and_no_more_are_written(value: float, written: str) -> None:
    assert json.dumps(rounded(torch.tensor([value], dtype=torch.float64))) == f"[{written}]"


def test_rounding_keeps_the_order_and_what_is_no_number_is_none() -> None:
    torch.manual_seed(0)
    values = torch.randn(5000).sort().values * 10 ** torch.linspace(-8, 3, 5000).flip(0).clamp(max=1)
    found = rounded(values.sort().values)
    assert found == sorted(found, key=lambda value: value or 0.0)
    assert all(len(json.dumps(value)) <= 11 for value in found)
    assert rounded(torch.tensor([1.0, -torch.inf, torch.nan])) == [1.0, None, None]
    assert rounded(torch.tensor([])) == []


def scores(count: int, layers: int = 3, looked_at: int = 0) -> StepScores:
    look = [torch.full((looked_at,), 0.125)] * layers if looked_at else []
    return StepScores(torch.arange(count).float(), [torch.full((count,), float(i)) for i in range(layers)], look)


def test_one_prune() -> None:
    state = pruned(explain=True)
    state.progress.explained[0] = scores(72)
    report = build_report(state, 0)
    assert report["kept"] == list(range(60, 80)), "an explanation has the kept positions"
    (step,) = report["explain"].pop("steps")
    assert not report["explain"] and step.pop("prune_layer") == 3
    assert step == {"scores": list(range(72)), "layers": {str(i + 1): [float(i)] * 72 for i in range(3)}}


def test_two_prunes_and_a_window() -> None:
    config = msgspec.structs.replace(CONFIG, steps=(STEP, SECOND))
    state = pruned(config=config, explain=True, explain_window=16)
    state.progress.explained = [scores(72, looked_at=64), scores(12, layers=2)]
    explained = build_report(state, 0)["explain"]
    assert explained["steps"][1]["positions"] == list(range(60, 72)) and "positions" not in explained["steps"][0]
    assert list(explained["steps"][1]["layers"]) == ["4", "5"]
    assert explained["looked_at"] == {"window": 16, "layers": {str(layer): [0.125] * 64 for layer in (1, 2, 3)}}


def test_a_ranker_that_looks_at_no_layer() -> None:
    state = pruned(explain=True, ranker="uniform")
    state.progress.explained[0] = scores(72, layers=0)
    assert build_report(state, 0)["explain"]["steps"][0]["layers"] == {}


def test_why_there_is_none() -> None:
    asked = RequestOptions(explain=True)
    dense = RequestState.dense_request(asked, 80, "short")
    assert build_report(dense, 0)["explain"] == {"none": explanation.DENSE}
    observed = RequestState.observed_request(asked, CONFIG, 80)
    assert build_report(observed, 0)["explain"] == {"none": explanation.OBSERVED}
    assert build_report(pruned(explain=True, keep=(1, 2)), 0)["explain"] == {"none": explanation.GIVEN}
    assert build_report(pruned(explain=True, keep_rate=1.0), 0)["explain"] == {"none": explanation.WHOLE}
    assert build_report(pruned(explain=True), 0)["explain"] == {"none": explanation.NOT_YET}


def test_who_does_not_ask_is_told_nothing() -> None:
    state = pruned()
    state.progress.explained[0] = scores(72)
    assert not {"explain", "kept"} & set(build_report(state, 0))


def test_the_last_chunk_has_the_longer_of_both_windows() -> None:
    for asked, rows in ((None, 8), (3, 8), (8, 8), (40, 40)):
        assert pruned(explain=True, explain_window=asked).last_rows(8) == rows
