"""The parts of benchmarks.eval_quality, with canned answers and a stand-in for the server."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks import eval_quality, eval_quality_plot
from benchmarks.quality import statistics, verdicts
from benchmarks.quality.answers import Answer, Answers, AnswersError
from benchmarks.quality.settings import DENSE, RankingError, Setting, load_rankings, options, settings
from benchmarks.quality.turns import TurnsError, with_turns
from claa_sglang.tasks.record import Followup, Message, Prompt, save

PROMPTS = [
    Prompt(task=task, source="prose", length=1024, seed=i, input_ids=[10 * j, i, *range(98)], answers=["7"])
    for j, task in enumerate(("a", "b"))
    for i in range(20)
]


# --- a server that is right more often the more it keeps ---


class Server:
    """Answers "7" to dense requests, and to pruned ones if the prompt's second token is below 20 * keep rate."""

    device = "a test"

    def __init__(self) -> None:
        self.bodies: list[Mapping[str, Any]] = []
        self.running = self.most = 0
        self.fail_after = math.inf
        self.before: list[int] = []  # the ids of the last request, which are all that is cached
        self.seconds = 0.0

    def info(self) -> dict[str, Any]:
        config = {"window": 8, "profile": None, "steps": [{"prune_layer": 3}]}
        return {"model_path": "somewhere/tiny", "claa": {"config": config}, "dtype": "float32"}

    def run(self, work: Any) -> Any:
        return asyncio.run(work)

    def flush(self) -> None:
        self.before = []

    def close(self) -> None:
        pass

    def alone(self) -> Server:
        return self

    async def ask(self, request: Mapping[str, Any], home: str | None = None) -> dict[str, Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if len(self.bodies) >= self.fail_after:
            raise RuntimeError("/generate: HTTP 500: planted")
        self.bodies.append(request)
        claa, ids = request["sampling_params"].get("custom_params", {}).get("claa", {}), request["input_ids"]
        await asyncio.sleep(self.seconds)
        rate = claa.get("keep_rate", 1.0)
        pruned = claa.get("enabled", True)
        report = {"pruned": pruned, "prompt_tokens": len(ids), "kept_tokens": int(rate * len(ids)), "keep_rate": rate}
        cached = len(os.path.commonprefix([self.before, ids[:-1]]))
        self.before = ids
        meta: dict[str, Any] = {"claa": {**report, "early_cached_tokens": cached}, "cached_tokens": cached}
        if pruned:
            kept = list(range(10, 10 + int(rate * len(ids))))
            kept[0] -= 0 < cached < len(ids) - 1  # a partial hit keeps another token
            meta["claa"] |= {
                "ranker": f"{claa.get('ranker', 'claa')}:x",
                "late_computed_tokens": len(kept),
                "kept": kept,
            }
        if request.get("top_logprobs_num"):
            meta["output_top_logprobs"] = [[(math.log(rate / 2), 5, None), (math.log(0.1), 6, None)]]
        return {"text": " 7" if ids[1] < 20 * rate else " 8", "meta_info": meta}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    running = Server()
    monkeypatch.setattr(eval_quality, "endpoint_of", lambda args: running)
    return running


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    save(PROMPTS, tmp_path / "prompts.jsonl.gz")
    return [str(tmp_path / "prompts.jsonl.gz"), "--url", "none", "--out", str(tmp_path / "q.json"), "--in-flight", "7"]


def result(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "q.json").read_text())


def test_accuracies_and_pairs(server: Server, command: list[str], tmp_path: Path) -> None:
    more = ["--rankers", "claa", "fastkv", "--keep-rates", "0.25", "0.5", "--kl-prompts", "3", "--sources-too"]
    assert eval_quality.main([*command, *more]) == 0
    assert len(server.bodies) == 40 * 5 and server.most == 7
    found = {(c["task"], c["source"], c["ranker"], c["keep_rate"]): c for c in result(tmp_path)["cells"]}
    assert len(found) == 3 * 2 * 5
    dense, half = found["a", "prose", "dense", 1.0], found["all", "all", "fastkv", 0.5]
    assert dense["n"] == 20 and dense["accuracy"][0] == 1 and dense["accuracy"][1] < 0.9
    assert half["n"] == 40 and half["accuracy"][0] == 0.5
    beside = half["to_dense"]
    assert beside["difference"][0] == -0.5 and (beside["only_dense"], beside["only_pruned"]) == (20, 0)
    assert beside["p_value"] == pytest.approx(2 * 0.5**20, rel=1e-3) and beside["agreement"][0] == 0.5
    # Token 5 has 0.5 dense and 0.25 here, token 6 has 0.1 in both, and the others what is left.
    expected = 0.5 * math.log(2) + 0.4 * math.log(0.4 / 0.65)
    assert beside["first_token_kl"][0] == pytest.approx(expected, abs=1e-3)
    assert result(tmp_path)["settings"] == [
        {"ranker": ranker, "keep_rate": rate, "ran": f"{ranker}:x"}
        for ranker in ("claa", "fastkv")
        for rate in (0.25, 0.5)
    ]


def test_a_record_is_short(server: Server, command: list[str], tmp_path: Path) -> None:
    """Sources, and what one task says of agreement and first tokens, are there when asked for; nothing is null."""
    prompts = [
        msgspec.structs.replace(p, source=s, seed=i, input_ids=[*p.input_ids, j])
        for i, p in enumerate(PROMPTS)
        for j, s in enumerate(("prose", "repeated"))
    ]
    save(prompts, tmp_path / "prompts.jsonl.gz")
    asked = [*command, "--keep-rates", "0.3"]
    eval_quality.main([*asked, "--sources-too"])
    whole = (tmp_path / "q.json").read_text()
    eval_quality.main(asked)
    text = (tmp_path / "q.json").read_text()
    cells = json.loads(text)["cells"]
    assert len(json.loads(whole)["cells"]) == 3 * 3 * 2 and len(cells) == 3 * 2 and "null" not in str(cells)
    assert len(text) < len(whole) / 2
    one, every = (next(c for c in cells if c["task"] == t and c["ranker"] == "claa") for t in ("a", "all"))
    assert set(every["to_dense"]) - set(one["to_dense"]) == {"agreement", "first_token_kl", "first_token_n"}
    assert all(len(repr(end).lstrip("-0.")) <= 5 for cell in cells for end in cell["accuracy"])


def test_the_switch_of_each_request(server: Server, command: list[str]) -> None:
    eval_quality.main([*command, "--rankers", "claa", "gemfilter", "--keep-rates", "0.5"])
    sent = [body["sampling_params"]["custom_params"]["claa"] for body in server.bodies]
    pruned = {"policy": "always", "keep_rate": 0.5}
    kinds = [{"enabled": False}, pruned, {**pruned, "ranker": "gemfilter"}]
    assert [sent.count(kind) for kind in kinds] == [40, 40, 40]


def test_a_stopped_run_goes_on(server: Server, command: list[str], tmp_path: Path) -> None:
    server.fail_after = 33
    with pytest.raises(RuntimeError, match="planted"):
        eval_quality.main([*command, "--keep-rates", "0.5"])
    with (tmp_path / "q.answers.jsonl").open("ab") as file:
        file.write(b'{"prompt": "cut off' + 100_000 * b".")
    server.fail_after = math.inf
    eval_quality.main([*command, "--keep-rates", "0.5"])
    assert len(server.bodies) == 80 and (tmp_path / "q.answers.jsonl").read_bytes().endswith(b"}\n")
    eval_quality.main([*command, "--keep-rates", "0.5"])
    assert len(server.bodies) == 80, "nothing was missing"
    assert {cell["n"] for cell in result(tmp_path)["cells"]} == {20, 40}


def test_what_a_stopped_run_has_is_counted_without_a_server(
    server: Server, command: list[str], tmp_path: Path, capsys: Any
) -> None:
    server.fail_after = 33
    with pytest.raises(RuntimeError, match="planted"):
        eval_quality.main([*command, "--keep-rates", "0.5"])
    prompts, *_ = command
    answers, out = tmp_path / "q.answers.jsonl", tmp_path / "q.json"
    count = [prompts, "--answers", str(answers), "--keep-rates", "0.5", "--out", str(out)]
    assert eval_quality.main(count) == 0
    found = result(tmp_path)
    assert found["model"] == "tiny" and found["count only"] and 0 < found["answered under every setting"] < 20
    with pytest.raises(AnswersError, match="--url or --engine"):
        eval_quality.main([prompts, "--answers", str(tmp_path / "none"), "--out", str(out)])
    with pytest.raises(SystemExit):
        eval_quality.main([prompts])
    assert "--answers to count" in capsys.readouterr().err


def test_answers_of_another_server_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Answers(path, {"model": "a", "claa": {"window": 8}}).close()
    Answers(path, {"model": "a", "claa": {"window": 8}}).close()
    with pytest.raises(AnswersError, match=r"another server \(claa differ\): name another file with --answers"):
        Answers(path, {"model": "a", "claa": {"window": 9}})


@pytest.mark.parametrize(
    ("claa", "why"),
    [
        (None, "start the server with --enable-claa"),
        ({"pruned": False, "reason": "too short", "prompt_tokens": 9}, "too short. Start the server with --claa-min"),
        ({"pruned": True, "keep_rate": 0.3, "prompt_tokens": 9}, "ran at keep rate 0.3"),
    ],
)
def test_a_request_that_ran_otherwise_is_no_measurement(claa: Any, why: str) -> None:
    from benchmarks.quality.asking import check_report

    with pytest.raises(RuntimeError, match=why):
        check_report({"claa": claa}, Setting("claa", 0.2))


def test_times_and_the_plot(server: Server, command: list[str], tmp_path: Path, capsys: Any) -> None:
    assert eval_quality.main([*command, "--keep-rates", "0.5"]) == 0
    assert eval_quality_plot.main([str(tmp_path / "q.json")]) == 1
    assert "it has no times: measure with --time" in capsys.readouterr().err
    assert eval_quality.main([*command, "--keep-rates", "0.5", "--time"]) == 0
    times = {time["ranker"]: time for time in result(tmp_path)["ttft"]}
    assert times["dense"]["ratio"] == 1 and times["claa"]["ratio"] > 0
    assert all(len(time["seconds"]) == 5 and time["length"] == 1024 for time in times.values())
    assert eval_quality_plot.main([str(tmp_path / "q.json"), "--task", "a"]) == 0
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("settings", [["0.5"], ["0.25", "0.5"]])
def test_times_beside_stock(
    server: Server, command: list[str], tmp_path: Path, monkeypatch: Any, settings: list[str]
) -> None:
    """Stock is asked without options of CLAA, once a round; every time has a ratio to it, and the plot uses them."""
    stock = Server()
    stock.seconds, server.seconds = 0.02, 0.01
    monkeypatch.setattr(eval_quality, "stock_of", lambda args, info: stock)
    assert eval_quality.main([*command, "--keep-rates", *settings, "--time", "--stock-url", "none"]) == 0
    assert len(stock.bodies) == 6 and not any("custom_params" in body["sampling_params"] for body in stock.bodies)
    assert [body["input_ids"] for body in stock.bodies] == [prompt.input_ids for prompt in PROMPTS[:6]]
    found = result(tmp_path)
    assert [one["ranker"] for one in found["ttft"]] == ["dense", *["claa"] * len(settings), "stock"]
    for one in found["ttft"]:
        least, middle, most = (one["to_stock"][name] for name in ("least", "median", "most"))
        assert least <= middle <= most
        assert middle == 1 if one["ranker"] == "stock" else 0.4 < middle < 0.9
    assert found["timed"] == "both over HTTP" and found["stock"]["dtype"] == "float32"
    assert eval_quality_plot.baseline(found["ttft"]) == "stock"
    assert eval_quality_plot.main([str(tmp_path / "q.json")]) == 0


def test_stock_must_be_the_same_model(monkeypatch: Any, capsys: Any) -> None:
    class Stock(Server):
        def __init__(self, urls: list[str], in_flight: int, claa: bool) -> None:
            super().__init__()
            assert (urls, in_flight, claa) == (["s"], 1, False)

        def info(self) -> dict[str, Any]:
            return super().info() | others

    monkeypatch.setattr(eval_quality, "UrlEndpoint", Stock)
    args = eval_quality.parse_args(["p", "--url", "u", "--time", "--stock-url", "s"])
    for others in ({"dtype": "bfloat16"}, {"model_path": "elsewhere/small"}):
        with pytest.raises(
            ValueError, match=f"s differs in {'dtype' if 'dtype' in others else 'model'}: start stock as"
        ):
            eval_quality.stock_of(args, Server().info())
    others = {"attention_backend": "fa3", "model_path": "elsewhere/tiny"}
    eval_quality.stock_of(args, Server().info())
    assert "stock differs in attention_backend" in capsys.readouterr().out
    for wrong, why in ((["--stock-url", "s"], "give --time"), (["--turns", "2", "--given", "a=b"], "later turns")):
        with pytest.raises(SystemExit):
            eval_quality.parse_args(["p", "--url", "u", *wrong])
        assert why in capsys.readouterr().err


# --- kept sets ---


def test_kept_sets_cold_and_after_a_hit(server: Server, command: list[str], tmp_path: Path) -> None:
    assert eval_quality.main([*command, "--keep-rates", "0.25", "0.5", "--kept-sets", "3"]) == 0
    found = {(one["keep_rate"], one["hit"]): one for one in result(tmp_path)["kept_sets"]}
    assert list(found) == [(0.25, "half"), (0.25, "all"), (0.5, "half"), (0.5, "all")]
    for (rate, hit), one in found.items():
        assert one["prompts"] == 3 and one["kept"] == int(rate * 100) and one["length"] == 1024
        assert one["cached"] == {"half": 50, "all": 99}[hit]
        assert one["differing"] == [int(hit == "half")] * 3 and one["median"] == one["most"] == int(hit == "half")
        assert one["same_text"] == one["same_grade"] == 3
    server.flush = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cached after a flush: something else runs"):
        eval_quality.main([*command, "--keep-rates", "0.5", "--kept-sets", "3"])


# --- verdicts ---


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


# --- turns ---


def chat(task: str, seed: int, followups: int) -> Prompt:
    more = [Followup(question=f"and {n}?", answers=["7"], answer_prefix="it is") for n in range(followups)]
    first = Message("user", f"{task} {seed}")
    return Prompt(task=task, source="s", length=9, messages=[first], answers=["7"], answer_prefix="is", followups=more)


def test_turns_go_on_with_what_was_said(
    server: Server, tmp_path: Path, monkeypatch: Any, small_model_path: Path, capsys: Any
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model_path)
    monkeypatch.setattr(
        Server, "info", lambda self, info=Server.info: info(self) | {"tokenizer_path": str(small_model_path)}
    )
    prompts = [chat("a", seed, 3) for seed in range(4)] + [chat("b", seed, 1) for seed in range(4)]
    save(prompts, tmp_path / "p.jsonl")
    command = [str(tmp_path / "p.jsonl"), "--url", "none", "--out", str(tmp_path / "q.json"), "--keep-rates", "0.5"]
    server.fail_after = 11
    with pytest.raises(RuntimeError, match="planted"):
        eval_quality.main([*command, "--turns", "3"])
    server.fail_after = math.inf
    assert eval_quality.main([*command, "--turns", "3"]) == 0
    assert "4 prompts without 3 turns are left out" in capsys.readouterr().out
    assert len(server.bodies) == 4 * 2 * 3, "what was answered before is not asked again"
    sent = [tokenizer.decode(body["input_ids"]) for body in server.bodies]
    last = [one for one in sent if one.endswith("it is") and "and 1?" in one]
    assert len(last) == 4 * 2
    for one in last:  # the server's own answers, behind the prefixes
        end, begin = "<|im_end|>\n<|im_start|>", "assistant\n"
        assert re.search(
            re.escape(begin) + r"is [78]" + re.escape(f"{end}user\nand 0?{end}{begin}") + "it is [78]<", one
        )
    found = {(c["turn"], c["task"], c["ranker"]): c for c in result(tmp_path)["cells"]}
    assert {at for at in found if at[1] == "a"} == {(n, "a", r) for n in (1, 2, 3) for r in ("dense", "claa")}
    assert all(cell["n"] == 4 for cell in found.values())
    tokens = [found[turn, "a", "claa"]["tokens"]["prompt"] for turn in (1, 2, 3)]
    assert tokens == sorted(set(tokens)) and "late_computed" not in found[3, "a", "dense"]["tokens"]
    assert [(one["turn"], one["within"] + one["interval"]) for one in result(tmp_path)["held"]] == [
        (1, 1),
        (2, 1),
        (3, 1),
    ]
    assert eval_quality.main([*command, "--turns", "3"]) == 0 and len(server.bodies) == 24


def test_prompts_without_turns_are_refused() -> None:
    with pytest.raises(TurnsError, match="no prompt has 2 follow-ups: ask for multi-key or the copies"):
        with_turns([chat("a", 0, 1)], 3)
    ids = Prompt(input_ids=[1], answers=["7"], followups=chat("a", 0, 1).followups)
    with pytest.raises(TurnsError, match="without --token-ids"):
        with_turns([ids], 2)


def test_the_plot_has_lines_of_other_servers(tmp_path: Path) -> None:
    def record(model: str, *rankers: str) -> dict[str, Any]:
        entries = [{"ranker": ranker} for ranker in ("dense", *rankers)]
        return {"model": model, "cells": entries, "ttft": list(entries)}

    (tmp_path / "one.json").write_text(json.dumps(record("m", "claa")))
    (tmp_path / "two.json").write_text(json.dumps(record("m", "claa", "fastkv")))
    drawn = record("m", "claa")
    eval_quality_plot.add(drawn, f"steps={tmp_path / 'one.json'}")
    eval_quality_plot.add(drawn, f"other={tmp_path / 'two.json'}")
    names = ["dense", "claa", "steps", "other, claa", "other, fastkv"]
    assert [entry["ranker"] for entry in drawn["cells"]] == names == [entry["ranker"] for entry in drawn["ttft"]]
    for argument, why in (
        (f"{tmp_path / 'one.json'}", "expected LABEL=FILE"),
        (f"a={tmp_path / 'one.json'}", "is of m"),
    ):
        with pytest.raises(eval_quality_plot.PlotError, match=why):
            eval_quality_plot.add(record("n"), argument)


def test_times_of_another_machine(tmp_path: Path) -> None:
    """A ranker that has none there has those of another one."""
    accuracy = {"mean": 0.5, "low": 0.4, "high": 0.6}
    settings = (("dense", 1.0), ("claa", 0.2), ("fastkv", 0.2))
    cells = [{"task": "all", "source": "all", "length": 1000, "ranker": r, "keep_rate": k} for r, k in settings]
    record = {"model": "m", "device": "a GPU", "cells": [cell | {"accuracy": accuracy} for cell in cells], "ttft": []}
    times = [{"length": 1000, "ranker": r, "keep_rate": k, "ratio": 0.6 if k < 1 else 1.0} for r, k in settings[:2]]
    (tmp_path / "q.json").write_text(json.dumps(record))
    (tmp_path / "t.json").write_text(json.dumps({"device": "a CPU", "ttft": times}))
    assert eval_quality_plot.main([str(tmp_path / "q.json")]) == 1
    assert eval_quality_plot.main([str(tmp_path / "q.json"), "--times", str(tmp_path / "t.json")]) == 0
    assert (tmp_path / "q.png").exists()
    eval_quality_plot.add(record, f"steps={tmp_path / 'q.json'}={tmp_path / 't.json'}")
    assert [(t["ranker"], t["ratio"]) for t in record["ttft"]] == [("steps", 0.6)]


# --- rankings made elsewhere ---


def test_a_given_ranking_becomes_positions(tmp_path: Path) -> None:
    path = tmp_path / "oracle.jsonl"
    path.write_text('{"key": "k", "order": [3, 19, 0, 7, 1]}\n')
    rankings = load_rankings([f"oracle={path}"])
    sent = options(Setting("oracle", 0.2), "k", 20, window=2, rankings=rankings)
    assert sent == {"keep": [0, 3, 18, 19]}
    with pytest.raises(RankingError, match="prompt other is missing"):
        options(Setting("oracle", 0.2), "other", 20, window=2, rankings=rankings)
    with pytest.raises(RankingError, match="beyond its 19 tokens"):
        options(Setting("oracle", 0.2), "k", 19, window=2, rankings=rankings)
    with pytest.raises(RankingError, match="expected NAME=FILE"):
        load_rankings(["oracle"])


def test_settings_are_dense_and_every_pair() -> None:
    names = [setting.name for setting in settings(["claa", "uniform"], [0.1, 0.2])]
    assert names == ["dense", "claa 0.1", "claa 0.2", "uniform 0.1", "uniform 0.2"]


# --- statistics ---


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
