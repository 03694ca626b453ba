"""The shipped machine records and the documents have what `benchmarks.plan_error` makes of the committed results."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks import plan_error
from benchmarks.plan_error import Error, Point
from claa_sglang.plan.machine import Machine, load, shipped
from claa_sglang.plan.predict import Prune
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "results" / "plan.md"


@pytest.fixture(scope="module")
def machines() -> dict[str, Machine]:
    return plan_error.machines()


@pytest.fixture(scope="module")
def found(machines: dict[str, Machine]) -> list[Error]:
    return plan_error.errors(machines)


def test_shipped_records_follow_from_committed_results(machines: dict[str, Machine], found: list[Error]) -> None:
    assert set(shipped()) == set(plan_error.FITTED)
    for card in shipped():
        made = msgspec.structs.replace(machines[card], checked=plan_error.checked(found, card))
        assert load(card) == made, "run: python -m benchmarks.plan_error --write"


def test_the_page_has_todays_errors(found: list[Error]) -> None:
    assert plan_error.summary(found) in PAGE.read_text(), "put the first table of benchmarks.plan_error there"


def test_cold_prompts_of_an_8b_model_are_predicted_within_two_percent(found: list[Error]) -> None:
    errors = [error for error in found if (error.point.model, error.point.kind) == ("llama-3.1-8b", "cold")]
    assert len(errors) == 7
    assert max(abs(error.of_stock) for error in errors) < 0.02


def test_a_measured_cpu_predicts_ratios_within_three_percent(found: list[Error]) -> None:
    errors = [error for error in found if error.point.machine == "cpu"]
    assert len(errors) == 13
    assert max(abs(error.of_stock) for error in errors) < 0.03


def test_an_error_is_that_of_the_ratio() -> None:
    point = Point("m", "f", "model", "cold", 100, 0, 8192, Prune(1, 0.2), stock=2.0, pruned=1.0)
    assert Error(point, stock=4.0, pruned=2.0).of_stock == 0
    assert Error(point, stock=2.0, pruned=1.1).of_stock == pytest.approx(0.1)
