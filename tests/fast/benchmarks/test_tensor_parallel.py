"""What benchmarks/tensor_parallel.py says of answers of one rank and of several."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import tensor_parallel
from benchmarks.tensor_parallel import Given, compared, failures, overlap
from claa_sglang.tasks.record import Prompt

PROMPTS = [Prompt(prompt=f"{i}", length=100, answers=["yes"]) for i in range(10)]
MIXED = {"counts": {"pruned": 200, "dense": 80, "dense, finished": 5, "hung up": 15}, "left": "", "retractions": 3}


def said(kept: range | None, right: int = 10) -> list[Given]:
    kept_set = None if kept is None else frozenset(kept)
    return [Given("yes" if i < right else "no", float(i < right), kept_set) for i in range(10)]


def answers(**split: Any) -> dict[str, dict[str, list[Given]]]:
    one = {"dense": said(None), "pruned": said(range(100))}
    return {"one": one, "again": one, "split": one | split}


def test_kept_sets_overlap_by_what_both_kept() -> None:
    assert overlap(frozenset(range(100)), frozenset(range(1, 101))) == 0.99
    assert overlap(frozenset(range(10)), frozenset(range(20))) == 0.5


def test_equal_answers_are_no_failure() -> None:
    rows = compared(PROMPTS, answers())
    assert [(row["server"], row["kind"], row.get("overlap")) for row in rows] == [
        ("again", "dense", None), ("again", "pruned", 1.0), ("split", "dense", None), ("split", "pruned", 1.0),
    ]  # fmt: skip
    assert failures({"compared": rows, "mixed": MIXED}) == []


@pytest.mark.parametrize(
    ("split", "mixed", "why"),
    [
        ({"pruned": said(range(2, 102))}, {}, "kept sets overlap by 0.9800"),
        ({"pruned": said(range(100), right=2)}, {}, "100 tokens, pruned: accuracy differs by -0.800"),
        ({}, {"counts": {**MIXED["counts"], "waited for ever": 1}}, "1 mixed requests: waited for ever"),
        ({}, {"counts": {"dense": 300, "hung up": 1}}, "no mixed request was pruned"),
        ({}, {"retractions": 0}, "no request was retracted"),
        ({}, {"left": "late slots {'held': 3}"}, "left behind: late slots {'held': 3}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_as_it_must_be_is_said(split: dict, mixed: dict, why: str) -> None:
    found = failures({"compared": compared(PROMPTS, answers(**split)), "mixed": MIXED | mixed})
    assert len(found) == 1 and why in found[0]


def test_the_second_server_of_one_rank_is_no_target() -> None:
    other = answers() | {"again": {"dense": said(None), "pruned": said(range(50, 150), right=2)}}
    assert failures({"compared": compared(PROMPTS, other), "mixed": MIXED}) == []


def test_ranks_on_a_cpu_have_a_core_each() -> None:
    assert tensor_parallel.cores(2) == {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
