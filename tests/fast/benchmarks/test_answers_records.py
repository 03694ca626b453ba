"""What a run of `benchmarks.answers_run` leaves: shards become one, records are short, times are merged."""

from __future__ import annotations

import json
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eval_quality_plot
from benchmarks.answers import asking, merge, plan, prompts, running, times, writing
from benchmarks.answers.clock import Clock
from benchmarks.answers.plan import Model
from benchmarks.answers.prompts import Item
from benchmarks.quality.answers import Answer, Answers
from benchmarks.quality.index import Entry
from tests.fast.benchmarks.answers_items import FACTS, entries


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
