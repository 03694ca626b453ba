"""Times of steps reach the cost model; measuring a machine gives constants that can be used."""

from __future__ import annotations

import math
import time

import pytest
import torch

from claa_sglang.policy.cost import Constants, CostModel, Work
from claa_sglang.policy.machine import measure
from claa_sglang.policy.rates import EAGER_LAUNCHES, launching
from claa_sglang.policy.step_timer import StepTimer

WORK = Work(passes=10, rows=1000)
START = Constants(1e-3, 1e-5, 1e-9, 1e-3)  # 20 ms for WORK


def test_a_step_is_timed() -> None:
    model = CostModel(START)
    with StepTimer(model, torch.device("cpu")).step() as step:
        time.sleep(0.03)
        step.work = WORK
    assert model.steps == 1 and 0.025 < model.seconds(WORK) < 0.06


def test_a_step_that_fails_is_not() -> None:
    model = CostModel(START)
    with pytest.raises(ZeroDivisionError), StepTimer(model, torch.device("cpu")).step() as step:
        step.work = WORK
        _ = 1 / 0
    assert model.steps == 0


def test_a_machine_is_measured() -> None:
    found = measure(
        hidden_size=64, heads=2, head_dim=32, weights=50_000, dtype=torch.float32, device=torch.device("cpu")
    )
    assert all(math.isfinite(value) and value > 0 for value in found[:4])
    assert found.per_eager == 0  # the CPU has no graphs
    assert found.per_row < found.per_pass < 1


def test_launching_shows_only_beyond_computing() -> None:
    assert launching(5e-6, 3e-5) == pytest.approx(EAGER_LAUNCHES * 5e-6 - 3e-5)  # 135M on an H200
    assert launching(5e-6, 7e-4) == 5e-6  # 8B
