"""A round of the TTFT benchmark: whose turn it is, with which prompts, what is timed, and what must not be."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ttft import scenarios
from benchmarks.ttft.engines import Answer
from benchmarks.ttft.settings import GPU_DEFAULTS
from benchmarks.ttft.variants import TTFT


class FakeEngine:
    """Stands for an EngineProcess: keeps what it was asked for."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def flush(self) -> None:
        self.log.append(f"flush {self.name}")


def test_engines_take_turns_in_alternating_order_with_empty_caches() -> None:
    log: list[str] = []
    lab = scenarios.Lab({name: FakeEngine(name, log) for name in ("a", "b")}, GPU_DEFAULTS, 1000)  # type: ignore[misc]

    def ask(engine: Any, claa: Any) -> dict[str, float]:
        log.append(f"ask {engine.name}")
        return {TTFT: 1.0}

    turns = [scenarios.Turn(name.upper(), name, ask) for name in ("a", "absent", "b")]
    for lab.index in (0, 1):
        assert list(lab.round(turns).items()) == [((TTFT, "A"), 1.0), ((TTFT, "B"), 1.0)]
    forwards = ["flush a", "ask a", "flush b", "ask b"]
    assert log == ["flush b", "ask b", "flush a", "ask a", *forwards]
    log.clear()
    lab.round(turns, flush=False)
    assert log == ["ask a", "ask b"]


def test_prompts_are_new_unless_they_are_asked_for_again() -> None:
    lab = scenarios.Lab({}, GPU_DEFAULTS, 1000)
    assert lab.prompt(50) != lab.prompt(50)
    assert lab.prompt(50, "a") == lab.prompt(50, "a") != lab.prompt(50, "b")


def answer(chunks: list[tuple[float, int]], cached: int = 0, **report: Any) -> Answer:
    return Answer(sent=0.0, chunks=chunks, output_ids=[], report=report, cached=cached)


def test_time_per_token_is_taken_while_all_decode() -> None:
    # Before 3.0 the first one decodes alone, faster; after 5.0 the second one does.
    first = answer([(1.0, 1), (1.1, 2), (2.9, 3), (3.4, 4), (5.0, 8)])
    second = answer([(3.0, 1), (3.5, 2), (4.5, 4), (5.2, 9)])
    assert scenarios.per_token([first, second]) == pytest.approx((1.6 / 4 + 1.5 / 3) / 2)
    assert scenarios.per_token([second]) == pytest.approx(2.2 / 8)


def test_requests_that_never_decode_together_have_no_time() -> None:
    with pytest.raises(RuntimeError, match="longer answers"):
        scenarios.per_token([answer([(1.0, 1), (2.0, 2)]), answer([(3.0, 1), (4.0, 2)])])


@pytest.mark.parametrize(
    ("got", "claa", "cached", "error"),
    [
        (answer([], pruned=True), {"keep_rate": 0.2}, 0, ""),
        (answer([], pruned=False), {"enabled": False}, 0, ""),
        (answer([]), None, 0, ""),
        (answer([], pruned=False), {"keep_rate": 0.2}, 0, "to run pruned"),
        (answer([], pruned=True), {"enabled": False}, 0, "to run dense"),
        (answer([], pruned=False), {"keep_rate": 0.2, "policy": "auto"}, 0, ""),
        (answer([], pruned=True), {"keep_rate": 0.2, "policy": "auto"}, 0, ""),
        (answer([], cached=5), None, 0, "none should have been"),
        (answer([], cached=900), None, 1000, ""),
        (answer([], cached=800), None, 1000, "1000 should have been"),
        (answer([], cached=5), None, None, ""),
    ],
)
def test_a_request_that_was_served_otherwise_is_an_error(got: Answer, claa: Any, cached: Any, error: str) -> None:
    if error:
        with pytest.raises(RuntimeError, match=error):
            scenarios.check(got, claa, cached)
    else:
        scenarios.check(got, claa, cached)
