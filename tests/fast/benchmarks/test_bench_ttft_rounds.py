"""A round of the TTFT benchmark: whose turn it is, with which prompts, what is timed, and what must not be."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from benchmarks.ttft import scenarios, variants
from benchmarks.ttft.engines import Answer, Request
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


def test_an_engine_rests_between_its_flush_and_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(scenarios.time, "sleep", lambda seconds: log.append(f"rest {seconds}"))
    settings = msgspec.structs.replace(GPU_DEFAULTS, rest=0.5)
    lab = scenarios.Lab({"a": FakeEngine("a", log)}, settings, 1000)  # type: ignore[dict-item]
    lab.round([scenarios.Turn("A", "a", lambda engine, claa: log.append("ask") or {TTFT: 1.0})])  # type: ignore[func-returns-value]
    assert log == ["flush a", "rest 0.5", "ask"]


class OneToken:
    """Stands for an EngineProcess whose server prunes where it must, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Any]] = []

    def flush(self) -> None:
        pass

    def run(self, request: Request) -> list[Answer]:
        self.asked.append((len(request.input_ids), request.claa))
        return [answer([(1.0, 1)], pruned=request.claa is not None and request.claa["policy"] == "always")]


def test_a_cold_round_has_what_the_server_chose_and_the_parts_of_both_bounds() -> None:
    engines = {name: OneToken() for name in ("stock", "claa", "early", "late", "one")}
    samples = scenarios.cold(scenarios.Lab(engines, GPU_DEFAULTS, 1000), 100)  # type: ignore[arg-type]
    assert samples[variants.PRUNED_TURNS, variants.auto(0.2)] == 0.0
    names = (variants.STOCK, variants.keep(0.2), variants.auto(0.2), variants.EARLY, variants.ONE)
    helpers = (variants.late(0.2), variants.one(0.2))
    assert {name for quantity, name in samples if quantity == TTFT} == {*names, *helpers}
    assert [tokens for tokens, _ in engines["one"].asked] in ([100, 20], [20, 100])
    assert engines["early"].asked == [(100, None)] and engines["late"].asked == [(20, None)]
    assert sorted(claa["policy"] for _, claa in engines["claa"].asked) == ["always", "auto"]


class Decoding(OneToken):
    """Each of its requests takes a second for a token."""

    def run(self, *requests: Request) -> list[Answer]:  # type: ignore[override]
        self.asked += [(len(one.input_ids), one.claa) for one in requests]
        return [answer([(1.0, 1), (2.0, 2)], pruned=one.claa is not None) for one in requests]


def test_batches_decode_both_ways_where_a_card_has_room() -> None:
    """A server of `decode_dense_layers` reads what was kept where it is asked to, and everything elsewhere."""
    settings = msgspec.structs.replace(GPU_DEFAULTS, decode_batches=[1, 3], decode_room=200, decode_dense_layers=4)
    engines = {name: Decoding() for name in ("stock", "claa")}
    lab = scenarios.Lab(engines, settings, 1000)  # type: ignore[arg-type]
    names = (variants.STOCK, variants.keep(0.2), variants.over_kept(0.2))
    assert scenarios.decode(lab, 60) == {(variants.per_token(n), name): 1.0 for n in (1, 3) for name in names}
    asked = [claa["decode_dense_layers"] for _, claa in engines["claa"].asked]
    assert sorted(asked) == [4] * 4 + [variants.OVER_ALL["decode_dense_layers"]] * 4
    assert engines["stock"].asked == [(60, None)] * 4
    assert set(scenarios.decode(lab, 100)) == {(variants.per_token(1), name) for name in names}
    assert settings.batches(300) == []


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
