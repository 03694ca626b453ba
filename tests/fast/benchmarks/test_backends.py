"""What benchmarks.backends makes of what it found; the engines themselves run on a GPU."""

from __future__ import annotations

import argparse
from argparse import Namespace
from concurrent.futures import Future
from typing import Any

import pytest

from benchmarks import backends
from benchmarks.checks import answers, prefill


def answer(tokens: list[int], gap: float) -> dict[str, Any]:
    """Of these tokens; each one's log probability is `gap` above the next choice's."""
    return {
        "output_ids": tokens,
        "meta_info": {"output_top_logprobs": [[(-0.1, t, None), (-0.1 - gap, 9, None)] for t in tokens]},
    }


def found(dense: float, keep: float, gap: float | None = None) -> dict[str, Any]:
    """One backend: one log probability dense and at keep rate 1, and the gap where graphs and eager decoding part."""
    return {
        "keep 1": {"dense": [[dense]], "keep 1": [[keep]], "tokens": [8]},
        "graphs": {"pruned, eights eagerly": {"equal": [32 if gap is None else 5], "gap": [gap]}},
        "KV type": "auto",
        "late slots held": 0,
        "prefill": {},
    }


def failures(**results: dict[str, Any]) -> list[str]:
    return backends.verdict(results, backends.noise(results))


def test_where_two_answers_part() -> None:
    left = [answer([1, 2, 3], 0.5), answer([1, 2, 3], 0.25)]
    right = [answer([1, 2, 3], 0.5), answer([1, 4, 3], 0.125)]
    assert answers.apart(left, right) == {"equal": [3, 1], "gap": [None, 0.25]}


def test_noise_is_what_two_dense_backends_differ_by() -> None:
    good = found(-1.0, -1.05)
    assert backends.noise({"a": good}) == {}
    three = {"a": good, "b": found(-1.1, -1.1), "c": {"error": "died"}}
    assert backends.noise(three) == {"auto": pytest.approx(0.1)}
    # Another KV type rounds otherwise, which is no noise of a backend.
    assert backends.noise({**three, "d": {**found(-3.0, -3.0), "KV type": "fp8_e4m3"}}) == backends.noise(three)
    assert not failures(a=good, b=found(-1.1, -1.1, gap=0.15))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (found(-1.1, -1.3), "keep rate 1 differs from dense by 0.2"),
        (found(-1.1, -1.1, gap=0.3), "the first choice leads by 0.3"),
        (found(-1.0, -1.0), "do not depend on attention"),
        ({**found(-1.1, -1.1), "late slots held": 2}, "2 late slots held"),
        ({"error": "died"}, "died"),
    ],
)
def test_what_is_not_as_it_must_be(bad: dict[str, Any], reason: str) -> None:
    (failure,) = failures(a=found(-1.0, -1.0), b=bad)
    assert reason in failure


@pytest.mark.parametrize(("pruned", "fails"), [(15, False), (16, True)])
def test_a_plan_that_waits_does_so_once_more(pruned: int, fails: bool) -> None:
    tokens = prefill.CHUNK + 1  # two forwards, each of which plans once
    kinds = {
        kind: {"waits": {"cudaStreamSynchronize": count, "cudaEventSynchronize": 2}, "own share": 0.0}
        for kind, count in (("dense", 10), ("pruned", pruned))
    }
    assert any("host waits" in f for f in failures(a={**found(-1.0, -1.0), "prefill": {str(tokens): kinds}})) == fails


def test_the_text_is_the_same_in_every_backend() -> None:
    class Tokenizer:
        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoded", (), {"input_ids": [len(word) for word in text.split()]})

    first = answers.prompts(Tokenizer(), (50, 3000))
    assert first == answers.prompts(Tokenizer(), (50, 3000)) and list(map(len, first)) == [50, 3000]
    assert first[0] != first[1][:50]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("fa3", {"attention_backend": "fa3", "kv_cache_dtype": "auto"}),
        ("triton:64", {"attention_backend": "triton", "page_size": 64, "kv_cache_dtype": "auto"}),
        ("fa3::fp8_e4m3", {"attention_backend": "fa3", "kv_cache_dtype": "fp8_e4m3"}),
        (
            "fa3+flashinfer:16",
            {
                "prefill_attention_backend": "fa3",
                "decode_attention_backend": "flashinfer",
                "page_size": 16,
                "kv_cache_dtype": "auto",
            },
        ),
    ],
)
def test_a_way_names_the_options_of_an_engine(text: str, options: dict[str, Any]) -> None:
    way = backends.Way.read(text)
    assert way.options() == options and backends.Way.read(str(way)) == way


@pytest.mark.parametrize("text", ["fa9", "fa3+fa9", "fa3:x", "fa3:1:auto:2", ""])
def test_what_is_no_way_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        backends.Way.read(text)


class Here:
    """Stands for a pool of processes: works in this one, as soon as it is asked."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, work: Any, *given: Any) -> Any:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*given))
        except Exception as error:  # noqa: BLE001
            done.set_exception(error)
        return done


def test_what_there_is_is_kept_after_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def observe(way: backends.Way, *_: Any) -> dict[str, Any]:
        raise RuntimeError(f"{way} was killed")

    monkeypatch.setattr(backends, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(backends, "measure", lambda way, *_: {"ranked": [], "KV type": str(way)})
    monkeypatch.setattr(backends, "observe", observe)
    kept: list[dict[str, Any]] = []
    args = Namespace(backends=[backends.Way.read("fa3")], observe=True, schedule=None, decode_dense_layers=4)
    results = backends.run_all(args, "model", None, lambda some: kept.append({k: dict(v) for k, v in some.items()}))
    assert kept[0] == {"fa3": {"ranked": [], "KV type": "fa3"}}
    assert results["fa3"] == {**kept[0]["fa3"], "error": "RuntimeError: fa3 was killed"} == kept[1]["fa3"]
