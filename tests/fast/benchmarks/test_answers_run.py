"""`benchmarks.answers_run` while it runs, without a server: lanes, steps, deadlines, and what failed."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.answers import asking, fleet, lanes, plan, running
from benchmarks.answers.clock import Clock
from benchmarks.answers.plan import Model
from benchmarks.answers.prompts import Item
from claa_sglang.tasks.record import Prompt
from tests.fast.benchmarks.answers_items import entries, items


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


def test_what_was_never_begun_is_on_record() -> None:
    some = items(lengths=(30,))
    steps = [lanes.Step(name, some, ()) for name in ("t30", "t20", "ranked", "s0", "s1")]
    failures = asking.Failures(Clock(1, 0))
    running.note_missing({"m": lanes.Work(steps[:2], steps[2:3], steps[3:])}, {"t30", "s1"}, failures)
    assert failures.found == ["t20: never begun", "ranked: never begun", "m: 24 prompts were never asked"]
