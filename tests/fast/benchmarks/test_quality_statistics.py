"""What answers say: intervals, pairs, divergences, and verdicts."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.quality import statistics, tables, verdicts
from benchmarks.quality.answers import Answer
from benchmarks.quality.settings import DENSE, Setting
from claa_sglang.tasks.record import Prompt
from tests.fast.quality_server import PROMPTS


def test_intervals_hold_their_mean_and_cover() -> None:
    """Of 200 samples of 60 prompts, about 95 % of the intervals hold the true mean."""
    rng = np.random.default_rng(3)
    for interval, draw, truth in (
        (statistics.mean_score, lambda: rng.binomial(1, 0.9, 60).astype(float), 0.9),
        (statistics.mean_score, lambda: rng.binomial(4, 0.7, 60) / 4, 0.7),
        (statistics.mean, lambda: rng.choice([-1.0, 0.0, 1.0], 60, p=[0.1, 0.85, 0.05]), -0.05),
    ):
        found = [interval(draw()) for _ in range(200)]
        assert all(one.low <= one.mean <= one.high for one in found)
        assert 0.90 <= sum(one.low <= truth <= one.high for one in found) / 200 <= 0.99


def test_equal_values_are_not_certain() -> None:
    found = statistics.mean(np.zeros(200))
    assert found.mean == 0 and found.high == -found.low == pytest.approx(1 - 0.025 ** (1 / 200))


def test_prompts_without_every_answer_are_left_out() -> None:
    known = {(p.key, s.name): Answer(p.key, s.name, "7", 100, 100) for p in PROMPTS for s in (DENSE, Setting("x", 0.5))}
    del known[PROMPTS[0].key, "x 0.5"]
    counts = {c.task: c.n for c in statistics.cells(PROMPTS, known, [DENSE, Setting("x", 0.5)])}
    assert counts == {"a": 19, "b": 20, "all": 39}


def test_all_lengths_together_and_the_first_ranker_s_lead() -> None:
    prompts = [msgspec.structs.replace(p, length=length) for p in PROMPTS for length in (1000, 2000)]
    prompts = [msgspec.structs.replace(p, seed=i) for i, p in enumerate(prompts)]
    wanted = [DENSE, Setting("x", 0.5), Setting("y", 0.5)]
    right = {DENSE.name: "7", "x 0.5": "7", "y 0.5": "8"}
    known = {(p.key, s.name): Answer(p.key, s.name, right[s.name], 100, 100) for p in prompts for s in wanted}
    found = {
        (c.ranker, c.length): c
        for c in statistics.cells(prompts, known, wanted)
        if (c.task, c.source) == ("all", "all")
    }
    assert {at: cell.n for at, cell in found.items() if at[0] == "y"} == {
        ("y", 0): 80,
        ("y", 1000): 40,
        ("y", 2000): 40,
    }
    assert found["x", 0].lead is None and found["dense", 0].lead is None
    assert found["y", 0].lead is not None and found["y", 0].lead.mean == 1


def test_coarse_kl_is_a_lower_bound() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        logits = rng.normal(size=(2, 30)) * 2
        p, q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        full = float((p * np.log(p / q)).sum())
        top = [[(int(i), math.log(d[i])) for i in np.argsort(-d)] for d in (p, q)]
        assert statistics.coarse_kl(*top) == pytest.approx(full)
        previous = full
        for size in (20, 10, 3):
            coarse = statistics.coarse_kl(top[0][:size], top[1][:size])
            assert 0 <= coarse <= previous + 1e-9
            previous = coarse
        assert statistics.coarse_kl(top[0][:10], top[0][:10]) == 0


def test_verdicts(capsys: Any) -> None:
    """Of 60 prompts a task: none lost; two lost; and 20 lost."""
    lost = {"a": 0, "b": 2, "c": 20}
    prompts = [
        Prompt(task=t, source="s", length=9, input_ids=[i, ord(t)], answers=["7"]) for t in lost for i in range(60)
    ]
    wanted = [DENSE, Setting("x", 0.5)]
    known = {
        (p.key, s.name): Answer(p.key, s.name, "8" if not s.dense and p.input_ids[0] < lost[p.task] else "7", 2, 2)
        for p in prompts
        for s in wanted
    }
    found = statistics.cells(prompts, known, wanted)
    said = {cell.task: verdicts.verdict(cell) for cell in verdicts.judged(found)}
    assert said == {"a": "within 1 point", "b": "interval has 0", "c": "worse"}
    (held,) = verdicts.held(found)
    assert (held.ranker, held.length, held.within, held.interval, list(held.worse)) == ("x", 9, 1, 1, ["c"])
    mean, low, high = held.worse["c"]
    assert mean == -33.3 and low < mean < high < 0
    tables.show(found, [], [])
    shown = capsys.readouterr().out
    assert all(f" {row} " in shown for row in ("+0.0 ok", "-3.3 ~", "-33.3 WORSE"))
