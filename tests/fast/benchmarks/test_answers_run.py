"""benchmarks.answers_run without a server: plans, phases and shards, lanes, merging, and what is refused."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import answers_run, eval_quality_plot
from benchmarks.answers import asking, checks, fleet, lanes, merge, phases, plan, prompts, running, times, writing
from benchmarks.answers.clock import Clock
from benchmarks.answers.plan import Model, PlanError
from benchmarks.answers.prompts import Item
from benchmarks.quality.answers import Answer, Answers
from benchmarks.quality.index import Entry
from claa_sglang.tasks.record import Prompt

FACTS = {"model": "tiny", "claa": {"window": 8}, "versions": {}}
SEED = 20_000


def entries(tasks: str = "ab", lengths: tuple[int, ...] = (10, 20, 30), count: int = 6) -> list[Entry]:
    kinds = itertools.product(tasks, lengths, ("chat", "prefix"), range(count))
    return [
        Entry(key=f"{t}{n}{f}{i}", task=t, source="prose", form=f, length=n, seed=SEED + i, answers=["7"])
        for t, n, f, i in kinds
    ]


def items(**more: Any) -> list[Item]:
    return [Item(entry, b"{}") for entry in entries(**more)]


def of(entry: Entry) -> Entry:
    return entry


def cells(some: list[Entry]) -> Counter[tuple[str, int, str]]:
    return Counter((one.task, one.length, one.form) for one in some)


def test_phases_leave_every_cell_alike() -> None:
    every = entries()
    first, others, rest = phases.phases(every, of, 6, SEED)
    assert sorted([*first, *others, *rest], key=str) == sorted(every, key=str)
    assert {one.length for one in [*first, *rest]} == {30} and {one.length for one in others} == {10, 20}
    assert set(cells(first).values()) == set(cells(rest).values()) == {3}
    (half, other) = phases.phases(entries(lengths=(5,)), of, 6, SEED)
    assert len(half) == len(other) == 12


def test_a_run_that_ends_early_has_balanced_cells() -> None:
    """The first half of the shards of a phase is a random half of it."""
    every = entries(tasks="abcd", lengths=(30,), count=100)
    done = phases.shards(every, 8)[:4]
    assert sorted(map(len, done)) == [100] * 4
    counts = cells([one for shard in done for one in shard])
    assert len(counts) == 8 and all(30 < count < 70 for count in counts.values())


def test_the_shipped_plan_is_one_that_runs() -> None:
    """Its commands are what eval_quality takes, every prompt is asked once, and timed servers keep their defaults."""
    whole = plan.load(plan.DEFAULT)
    checks.commands(whole, 4)
    for name, model in whole.models.items():
        made = checks._stand_ins(whole, model)
        work = lanes.work(name, model, made, 4)
        assert sum(len(step.items) for step in work.shards) == len(made[prompts.ANSWERS])
        assert model.count * len(whole.sources) >= 200, "prompts per task and length"
        assert [len(step.items) for step in work.times] == [2 * 2 * model.times.prompts] * 3
        lengths = [step.items[0].entry.length for step in work.times]
        assert lengths == sorted(model.lengths, reverse=True), "the longest first: it matters most"
    paths = {name: Path("/m", name) for name in whole.models}
    servers = {one.name: one for one in fleet.wanted(whole, paths, 4, cpu=False)}
    assert sorted(servers) == sorted(
        [f"qwen2.5-coder-0.5b.{kind}" for kind in ("claa0", "claa1", "claa2", "claa3", "stock0")]
        + [f"smollm2-135m-instruct.{kind}" for kind in ("claa1", "claa2", "stock1")]
    )
    fast = {name for name, one in servers.items() if "--cuda-graph-backend-prefill" in one.flags}
    assert fast == {name for name in servers if name[-1] not in "01"} | {"qwen2.5-coder-0.5b.claa1"}
    assert all(
        ("--enable-claa" in one.flags) != one.stock and "--max-total-tokens" in one.flags for one in servers.values()
    )


def test_the_quiet_plan_times_lengths_that_it_does_not_ask() -> None:
    whole = plan.load("quiet")
    checks.commands(whole, 1)
    (name, model), (other, small) = whole.models.items()
    assert whole.quiet and small.times is None and model.only_timed == [16384, 30000]
    made = checks._stand_ins(whole, model)
    work = lanes.work(name, model, made, 1)
    assert [step.items[0].entry.length for step in work.times] == [30000, 16384, 4096]
    assert all(len(step.items) == 2 and step.stock for step in work.times), "one of each form"
    assert {item.entry.length for step in work.shards for item in step.items} == {4096}
    paths = {one: Path("/m", one) for one in whole.models}
    assert [one.name for one in fleet.wanted(whole, paths, 1, cpu=False)] == [
        f"{name}.claa0",
        f"{name}.stock0",
        f"{other}.claa0",
    ]
    chunks = prompts.chunks(whole, paths)
    timed = [chunk for chunk in chunks if chunk.use == prompts.TIMES]
    assert {(chunk.model, chunk.length, chunk.count) for chunk in timed} == {(name, 16384, 1), (name, 30000, 1)}
    counts = Counter((chunk.model, chunk.length) for chunk in chunks for _ in range(chunk.count))
    assert counts[name, 4096] == counts[other, 1024] == 11 * 2 * 100


def test_fewer_gpus_have_everything() -> None:
    model = Model(lengths=[1], tasks=["a"], count=1, rates=[0.2], gpus=[1, 2, 3])
    assert (model.placed(4), model.placed(2), model.placed(1)) == ([1, 2, 3], [1, 0], [0])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"count": 0}, "count above 0"),
        ({"rates": [0.3]}, "times.rates lack"),
        ({"rankers": {"rankers": ["claa"], "rates": [0.2], "length": 7, "prompts": 1}}, "rankers.length 7"),
        ({"times": {"tasks": ["b"], "rankers": [], "rates": [0.2]}}, "times.tasks"),
        ({"cuont": 1}, "unknown field `cuont`"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    times = {"tasks": ["a"], "rankers": ["claa"], "rates": [0.2]}
    model = {"lengths": [1], "tasks": ["a"], "count": 1, "rates": [0.2], "gpus": [0], "times": times}
    (tmp_path / "plan.json").write_text(json.dumps({"models": {"m": {**model, **change}}}))
    with pytest.raises(PlanError, match=why):
        plan.load(str(tmp_path / "plan.json"))


def test_what_is_missing_is_said_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "qwen2.5-coder-0.5b"
    model.mkdir()
    (tmp_path / "out" / "raw").mkdir(parents=True)
    command = ["--models", str(model), "--out", str(tmp_path / "out"), "--cpu"]
    assert answers_run.main([*command, "--seconds", "50"]) == answers_run.REFUSED
    said = capsys.readouterr().err
    assert "nothing was started" in said and "no config.json" in said and "no *.safetensors" in said
    assert "--seconds 50" in said and "name another --out" in said
    assert answers_run.main(["--models", "elsewhere", *command[2:], "--seconds", "500"]) == answers_run.REFUSED
    assert "no model 'elsewhere': it has qwen2.5-coder-0.5b, smollm2" in capsys.readouterr().err
    assert answers_run.main([*command, "--seconds", "500", "--plan", "none"]) == answers_run.REFUSED
    assert "known by name: quiet, qwen-and-smollm2" in capsys.readouterr().err


def test_a_step_that_eval_quality_would_refuse_is_found() -> None:
    whole = plan.load(plan.DEFAULT)
    (name, model), *_ = whole.models.items()
    wrong = msgspec.structs.replace(model, times=msgspec.structs.replace(model.times, rounds=2))
    with pytest.raises(checks.CheckError, match=r"times30000: .*--rounds: at least 5"):
        checks.commands(msgspec.structs.replace(whole, models={name: wrong}), 4)


def answered(path: Path, some: list[Entry], settings: tuple[str, ...], text: str, facts: Any = FACTS) -> None:
    file = Answers(path, facts)
    for entry in some:
        for setting in settings:
            file.add(Answer(entry.key, setting, text, 30, 6, ranker="claa:x" if setting != "dense" else None))
    file.close()


def test_shards_of_several_servers_become_one(tmp_path: Path) -> None:
    every = entries()
    answered(tmp_path / "a.answers.jsonl", every[::2], ("dense", "claa 0.2"), "7")
    answered(tmp_path / "b.answers.jsonl", every[1::2], ("dense", "claa 0.2"), "8")
    answered(tmp_path / "c.answers.jsonl", every[:4], ("dense", "claa 0.2", "fastkv 0.2"), "9")
    answered(tmp_path / "d.answers.jsonl", every, ("dense",), "other", {**FACTS, "model": "b"})
    with (tmp_path / "b.answers.jsonl").open("ab") as file:
        file.write(b'{"prompt": "cut o')
    (tmp_path / "e.answers.jsonl").write_bytes(b"")
    known, facts, wrong = merge.answers_of(tmp_path.glob("*.answers.jsonl"))
    assert facts == FACTS and len(known) == 2 * len(every) + 4
    assert {known[one.key, "dense"].text for one in every[::2]} == {"7"}, "the first file's answer counts"
    assert len(wrong) == 2 and "d.answers.jsonl: answers of another server (model differ)" in wrong[0]

    raw = tmp_path / "raw"
    merge.save_raw(known, facts, raw / "a.jsonl.xz")
    assert merge.answers_of([raw / "a.jsonl.xz"])[:2] == (known, facts)

    model = Model(
        lengths=[10, 20, 30],
        tasks=["a", "b"],
        count=6,
        rates=[0.2],
        gpus=[0],
        rankers=plan.Rankers(rankers=["claa", "fastkv"], rates=[0.2], length=30, prompts=2),
    )
    main, rankers = merge.groups(model, every, [])
    assert {one.length for one in rankers.entries} == {30} and len(rankers.entries) == 24
    assert merge.count(rankers, known)["answered under every setting"] == 0
    counted = merge.count(main, known)
    assert counted["answered under every setting"] == len(every) and counted["settings"][0]["ran"] == "claa:x"
    accuracy = {(c["task"], c.get("form"), c["length"]): c["accuracy"][0] for c in counted["cells"]}
    assert accuracy["a", None, 10] == accuracy["a", "chat", 10] == 0.5


def test_times_of_every_length_are_together(tmp_path: Path) -> None:
    def part(name: str, length: int | None) -> None:
        ttft = [{"length": length}] if length else []
        found = {"device": "H", "ttft": ttft, "kept_sets": ttft, **({"stock": {"dtype": "b"}} if length else {})}
        (tmp_path / name).write_text(json.dumps(found))

    part("times300.json", 300)
    part("times20.json", 20)
    part("phase0.json", None)
    (tmp_path / "cut.json").write_text('{"device": "H", "tt')
    found = merge.measured(tmp_path.glob("*.json"))
    assert [one["length"] for one in found["ttft"]] == [one["length"] for one in found["kept_sets"]] == [20, 300]
    assert found["device"] == "H" and found["stock"] == {"dtype": "b"}


def test_a_long_record_is_made_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"cells": [{"task": "a", "form": "chat"}, {"task": "a"}], "turns": {"cells": [{"form": "chat"}]}}
    merge.save_record(record, tmp_path / "whole.json")
    assert len(json.loads((tmp_path / "whole.json").read_text())["cells"]) == 2
    monkeypatch.setattr(merge.recording, "LIMIT", 60)
    merge.save_record(record, tmp_path / "short.json")
    short = json.loads((tmp_path / "short.json").read_text())
    assert short["cells"] == [{"task": "a"}] and short["turns"]["cells"] == [] and "eval_quality" in short["left out"]


def test_the_figure_has_the_rankers_at_their_length() -> None:
    def cell(length: int, ranker: str, **more: Any) -> dict[str, Any]:
        return {"length": length, "ranker": ranker, **more}

    record = {
        "cells": [cell(10, "claa"), cell(30, "claa"), cell(10, "claa", form="chat"), cell(10, "claa", turn=2)],
        "rankers": {"cells": [cell(30, "claa"), cell(30, "fastkv")]},
    }
    shown = [(one["length"], one["ranker"]) for one in eval_quality_plot.cells_of(record)]
    assert shown == [(10, "claa"), (30, "claa"), (30, "fastkv")]


def test_times_of_a_quiet_run_take_the_place_of_busy_ones(tmp_path: Path) -> None:
    """The record and its figure name the card of each number, and rankers have the names of today."""

    def ttft(ranker: str, ratio: float) -> dict[str, Any]:
        rate = 1.0 if ranker == "dense" else 0.2
        return {"length": 30, "ranker": ranker, "keep_rate": rate, "ratio": ratio, "to_stock": {"median": ratio}}

    def cell(ranker: str) -> dict[str, Any]:
        rate = 1.0 if ranker == "dense" else 0.2
        where = {"task": "all", "source": "all", "length": 30, "ranker": ranker, "keep_rate": rate}
        return {**where, "n": 4, "accuracy": [0.5, 0.4, 0.6]}

    steps = [{"prune_layer": 3, "score_layers": [2, 3], "keep_rate": 0.2}]
    claa = {"steps": steps, "ranker": "claa"}
    busy = {"model": "m", "card": "H200", "device": "H200", "date": "2026-11-27", "claa": claa}
    asked = ["dense", "claa", "claa:last=on"]
    record = {**busy, "cells": [cell(one) for one in asked], "ttft": [ttft(one, 0.9) for one in asked]}
    timed = [ttft(one, 0.6) for one in ("dense", "claa:last=off", "claa")]
    quiet = {**busy, "card": "H100, driver", "device": "H100", "command": "quietly", "ttft": timed}
    files = {"record": record, "quiet": quiet, "else": {**quiet, "model": "other"}, "untimed": {**quiet, "ttft": []}}
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    words = [str(tmp_path / "record.json"), "--rename", "claa", "claa:last=off", "--rename", "claa:last=on", "claa"]
    for wrong in ("else", "untimed"):
        assert times.main([*words, "--times", str(tmp_path / f"{wrong}.json")]) == 1
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert times.main([*words, "--times", str(tmp_path / "quiet.json")]) == 0
    merged = json.loads((tmp_path / "record.json").read_text())
    assert merged["ttft"] == timed and (merged["card"], merged["timed on"]) == ("H200", "H100")
    assert merged["timed by"]["card"] == "H100, driver" and merged["times of its own"]["card"] == "H200"
    assert [one["ranker"] for one in merged["cells"]] == ["dense", "claa:last=off", "claa"]
    assert [one["ranker"] for one in merged["times of its own"]["ttft"]] == ["dense", "claa:last=off", "claa"]
    assert merged["claa"] == record["claa"] and merged["renamed since"]["claa"] == "claa:last=off"
    assert (tmp_path / "record.png").stat().st_size > 1000


def test_a_prompt_keeps_its_form_as_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that cannot be made says why, and stops no other."""

    class Tokenizer:
        def __call__(self, text: str, **more: Any) -> Any:
            return type("Ids", (), {"input_ids": text.split()})

    whole = Prompt(task="t", source="s", length=9, seed=1, prompt="a b c", answers=["1"], answer_prefix=" It is")
    monkeypatch.setattr(prompts, "_tokenizer", lambda path: Tokenizer())
    monkeypatch.setattr(prompts, "token_ids", lambda prompt, tokenizer: [1, 2])
    monkeypatch.setattr(prompts, "make", lambda *args: msgspec.structs.replace(whole, prompt="a", seed=args[4]))
    chunk = prompts.Chunk("m", Path("m"), prompts.ANSWERS, "t", 9, "prefix", "s", 5, 2)
    made = prompts.make_chunk(chunk)
    assert made.error.startswith("ValueError: exactly one of"), "a plain prompt cannot have ids besides"
    monkeypatch.setattr(
        prompts, "make", lambda *args: msgspec.structs.replace(whole, prompt=None, input_ids=[7], seed=args[4])
    )
    made = prompts.make_chunk(chunk)
    assert [(item.entry.form, item.entry.seed) for item in made.items] == [("prefix", 5), ("prefix", 6)]
    again = msgspec.json.decode(made.items[0].line, type=Prompt)
    assert again.input_ids == [1, 2] and again.key == made.items[0].entry.key
    assert "of the form prefix" in prompts.make_chunk(chunk._replace(form="chat")).error


class Process:
    """A server's process that is there, or is not."""

    def __init__(self) -> None:
        self.status: int | None = None

    def poll(self) -> int | None:
        return self.status


class Server:
    def __init__(self) -> None:
        self.process = Process()


class FakeAsker:
    """Notes what it is asked; the server of `dies` is gone during its first step."""

    over = False

    def __init__(self, dies: int | None = None) -> None:
        self.ran: list[tuple[str, int]] = []
        self.dies = dies

    def run(self, step: lanes.Step, place: asking.Place) -> bool:
        if place.gpu == self.dies:
            place.claa.process.status = 1
            return False
        self.ran.append((step.name, place.gpu))
        return True


def place(gpu: int) -> asking.Place:
    ready: Future[None] = Future()
    ready.set_result(None)
    return asking.Place("m", gpu, Server(), None, [ready])  # type: ignore[arg-type]


def test_a_card_whose_server_died_gives_its_shard_back() -> None:
    steps = [lanes.Step(f"s{i}", [], ()) for i in range(4)]
    asker, queue = FakeAsker(dies=0), deque(steps)
    nothing = {"m": lanes.Work([], [], [])}
    asking.lane(asker, [place(0)], nothing, {"m": queue})  # type: ignore[arg-type]
    assert sorted(step.name for step in queue) == ["s0", "s1", "s2", "s3"] and not asker.ran
    asking.lane(asker, [place(1)], nothing, {"m": queue})  # type: ignore[arg-type]
    assert sorted(asker.ran) == [(f"s{i}", 1) for i in range(4)]


def test_times_are_alone_and_first() -> None:
    asker = FakeAsker()
    work = lanes.Work([lanes.Step("t1", [], ()), lanes.Step("t2", [], ())], [lanes.Step("r", [], ())], [])
    asking.lane(asker, [place(0)], {"m": work}, {"m": deque([lanes.Step("s", [], ())])})  # type: ignore[arg-type]
    assert [name for name, _ in asker.ran] == ["t1", "t2", "r", "s"]


def test_in_a_quiet_run_all_times_come_before_all_else() -> None:
    """And wait for servers of other cards, which would take cores of those that are timed."""
    asker, late = FakeAsker(), place(1)
    starting: Future[None] = Future()
    late = late._replace(ready=[starting])
    model = Model(lengths=[1], tasks=["a"], count=1, rates=[0.2], gpus=[0, 1])
    told = running.Run(plan.Plan(models={"m": model}, quiet=True), {}, Path(), Path(), 2, True, "")
    work = {"m": lanes.Work([lanes.Step("t", [], ())], [lanes.Step("r", [], ())], [])}
    prepared: Future[Any] = Future()
    prepared.set_result((work, {"m": deque([lanes.Step("s", [], ())])}))
    places = {0: [place(0)], 1: [late]}
    with ThreadPoolExecutor(3) as threads:
        alone = threads.submit(running._times_alone, places, told, asker, prepared)  # type: ignore[arg-type]
        each = [
            threads.submit(running._lane, gpu, here, told, asker, prepared, alone)  # type: ignore[arg-type]
            for gpu, here in places.items()
        ]
        time.sleep(0.3)
        early = list(asker.ran)
        starting.set_result(None)
        for one in each:
            one.result(10)
    assert not early
    assert asker.ran[0] == ("t", 0) and sorted(name for name, _ in asker.ran) == ["r", "s", "t"]


def test_a_step_ends_with_asking_and_says_why_it_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes: one that eval_quality refuses, and one that would outlast the deadline."""
    clock = Clock(seconds=60, finish=0)
    failures = asking.Failures(clock)
    asker = asking.Asker(clock, failures, tmp_path / "answers", tmp_path, tmp_path, cpu=False)
    url = type("Running", (Server,), {"url": "http://127.0.0.1:9"})
    where = asking.Place("m", 0, url(), None, [])
    item = Item(entries()[0], b"no prompt")
    assert not asker.run(lanes.Step("bad", [item], ()), where)
    assert [text.partition("Error")[0] for text in failures.found] == [
        "bad: exit status 1: claa_sglang.tasks.record.Prompt"
    ]
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    asker._running.add(sleeper)
    asker.stop()
    assert sleeper.wait(10) != 0 and not asker.run(lanes.Step("late", [item], ()), where)
    said = capsys.readouterr().out
    assert said.index("logs/bad.log; once more") < said.index("FAILED: bad"), "tried twice, on record once"


def test_a_step_is_cut_short_at_the_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that never answers: the process that asks it is gone when asking ends."""
    prompt = msgspec.json.encode(Prompt(task="a", input_ids=[1], answers=["7"]))
    clock = Clock(seconds=60, finish=60 - asking.LAST - 3)
    failures = asking.Failures(clock)
    asker = asking.Asker(clock, failures, tmp_path / "answers", tmp_path, tmp_path, cpu=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        where = asking.Place("m", 0, type("Silent", (Server,), {"url": url})(), None, [])
        assert not asker.run(lanes.Step("slow", [Item(entries()[0], prompt)], (), stock=True), where)
    assert clock.passed < 20 and asker.over and not asker._running
    assert failures.found == ["slow: cut short, so its times are missing"]
    assert "what was answered counts" in capsys.readouterr().out


def test_a_server_that_is_late_is_on_record() -> None:
    clock = Clock(seconds=0.1, finish=0)
    failures, late = asking.Failures(clock), fleet.Wanted("m", 0, False, ())
    never: Future[None] = Future()
    running._follow([never], {late: Server()}, {late: never}, clock, failures)  # type: ignore[dict-item]
    assert failures.found == ["not ready when asking ended: m.claa0"]


def test_a_process_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert fleet.environment(1, cpu=False) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert fleet.environment(1, cpu=False) == {"CUDA_VISIBLE_DEVICES": "6"}


def finished(out: Path, count: Any = None, left: float = 60) -> tuple[dict[str, Any], list[str]]:
    """The record of a run that answered everything and timed one length, and its failures."""
    every, home = entries(lengths=(30,)), out / "answers" / "m"
    home.mkdir(parents=True)
    answered(home / "s.answers.jsonl", every, ("dense", "claa 0.2"), "7")
    (home / "times30.json").write_text(json.dumps({"device": "H", "ttft": [{"length": 30}], "kept_sets": []}))
    model = Model(lengths=[30], tasks=["a", "b"], count=6, rates=[0.2], gpus=[0])
    told = running.Run(plan.Plan(models={"m": model}), {}, out, out, 1, True, "python -m benchmarks.answers_run")
    clock = Clock(left, 0)
    failures = asking.Failures(clock)
    with ThreadPool(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_draw", lambda record, path: None)
        if count:
            patch.setattr(merge, "count", count)
        writing.write(told, clock, pool, failures, {"m": {prompts.ANSWERS: [Item(one, b"") for one in every]}})
    return json.loads((out / "m.json").read_text()), failures.found


def test_a_record_has_what_there_is(tmp_path: Path) -> None:
    record, failures = finished(tmp_path / "whole")
    assert record["answered under every setting"] == 24 and record["ttft"] and not failures
    assert record["claa"] == FACTS["claa"] and record["command"].endswith("answers_run")
    assert not (tmp_path / "whole" / "answers").exists()

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("planted")

    record, failures = finished(tmp_path / "broken", broken)
    assert record["ttft"] and "cells" not in record and record["failures"] == failures
    assert failures == ["m: counting answers: ZeroDivisionError: planted"]
    assert (tmp_path / "broken" / "answers").is_dir() and (tmp_path / "broken" / "raw" / "m.index.jsonl.xz").is_file()

    record, failures = finished(tmp_path / "late", lambda *args: time.sleep(2), left=0)
    assert record["ttft"] and "no time to count answers" in failures[0]


def test_what_was_never_begun_is_on_record() -> None:
    some = items(lengths=(30,))
    steps = [lanes.Step(name, some, ()) for name in ("t30", "t20", "ranked", "s0", "s1")]
    failures = asking.Failures(Clock(1, 0))
    running.note_missing({"m": lanes.Work(steps[:2], steps[2:3], steps[3:])}, {"t30", "s1"}, failures)
    assert failures.found == ["t20: never begun", "ranked: never begun", "m: 24 prompts were never asked"]
