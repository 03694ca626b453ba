"""`benchmarks.answers_run` as a whole, on the CPU engine: what a GPU host runs for an hour passes here in small.

Two lanes with a CLAA server each, stock beside the first, a tiny model, two tasks, two lengths, two forms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eval_quality, tiny_model
from tests.conftest import ROOT
from tests.engine_server import QUICKER

pytestmark = pytest.mark.engine

SECONDS, FINISH = 400, 20  # a busy machine takes twice the usual 110
TASKS, LENGTHS, COUNT = ["multi-key", "needle-uuid"], [320, 640], 2
RANKERS = ["claa", "claa:paper", "fastkv"]
MODEL = {
    "lengths": LENGTHS,
    "tasks": TASKS,
    "count": COUNT,
    "rates": [0.5],
    "claa": ["--claa-prune-layer", "3", "--claa-score-layers", "2,3"],
    "gpus": [0, 1],
    "in_flight": 4,
    "times": {"tasks": ["multi-key"], "prompts": 1, "rankers": RANKERS, "rates": [0.5], "kept_sets": 1},
    "rankers": {"length": max(LENGTHS), "prompts": 1, "rankers": RANKERS, "rates": [0.5]},
    "turns": {"tasks": ["multi-key"], "lengths": LENGTHS[:1], "rates": [0.5], "count": 1},
}


def relative(path: Path) -> str:
    """As it is typed in the repository's root."""
    return os.path.relpath(path, ROOT)


def run(home: Path, model: Path, gpus: int, **changed: Any) -> subprocess.CompletedProcess[str]:
    """The command, its results in `home / "out"`; changed: of MODEL."""
    (home / "plan.json").write_text(json.dumps({"finish": FINISH, "models": {model.name: MODEL | changed}}))
    words = ["--models", relative(model), "--out", relative(home / "out"), "--plan", relative(home / "plan.json")]
    words += ["--seconds", str(SECONDS), "--cpu", "--gpus", str(gpus), "--processes", "1"]
    command = [sys.executable, "-m", "benchmarks.answers_run", *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | QUICKER)
    print(ran.stdout)
    return ran


@pytest.fixture(scope="module")
def made(small_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of results, and what the run printed."""
    home = tmp_path_factory.mktemp("answers-run")
    ran = run(home, tiny_model.build_with_tokenizer(home, small_model_path), gpus=2)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}\n{logs(home / 'out')}"
    return home / "out", ran.stdout


def logs(out: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted((out / "logs").glob("*")))


def test_a_run_leaves_everything(made: tuple[Path, str]) -> None:
    out, said = made
    (path,) = out.glob("*.json")
    record = json.loads(path.read_text())
    assert record["failures"] == [] and record["card"] == "CPU engine" and path.stat().st_size < 300_000
    assert record["command"].startswith("python -m benchmarks.answers_run --models ") and record["date"]
    assert record["versions"]["sglang"] and record["claa"]["steps"] and record["stock"]["dtype"] == "float32"

    prompts = len(TASKS) * len(LENGTHS) * COUNT * 2
    assert record["prompts"]["count"] == record["answered under every setting"] == prompts
    assert record["prompts"]["forms"] == {"chat": prompts // 2, "prefix": prompts // 2}
    cells = {(c["task"], c["length"], c.get("form"), c["ranker"]): c["n"] for c in record["cells"]}
    for task in TASKS:
        for length in LENGTHS:
            assert cells[task, length, None, "claa"] == cells[task, length, None, "dense"] == 2 * COUNT
            assert cells[task, length, "chat", "claa"] == cells[task, length, "prefix", "claa"] == COUNT

    assert {c["ranker"] for c in record["rankers"]["cells"]} == {"dense", *RANKERS}
    assert record["rankers"]["answered under every setting"] == len(TASKS) * 2 + 2, "with the two that were timed"
    assert {c.get("turn", 1) for c in record["turns"]["cells"]} == {1, 2, 3}
    assert {(t["length"], t["ranker"]) for t in record["ttft"]} == {
        (length, ranker) for length in LENGTHS for ranker in ("dense", "stock", *RANKERS)
    }
    assert all(t["to_stock"]["median"] > 0 for t in record["ttft"])
    assert {(k["length"], k["hit"]) for k in record["kept_sets"]} == {
        (n, hit) for n in LENGTHS for hit in ("half", "all")
    }
    assert path.with_suffix(".png").stat().st_size > 1000
    assert not (out / "answers").exists() and len(list((out / "logs").glob("*.claa?.log"))) == 2
    for step in ("servers start", "prompts are made", ".stock0 is ready", "answers are written"):
        assert step in said


def test_its_answers_are_counted_again(made: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = made
    (path,) = out.glob("*.json")
    record, raw = json.loads(path.read_text()), out / "raw"

    def count(kind: str, *more: str) -> Any:
        files = [f"{raw / path.stem}.{each}.jsonl.xz" for each in (kind, "answers")]
        words = [files[0], "--index", "--answers", files[1], "--keep-rates", "0.5", "--out", str(tmp_path / "q.json")]
        assert eval_quality.main([*words, *more]) == 0
        return json.loads((tmp_path / "q.json").read_text())["cells"]

    assert count("index") == record["cells"]
    assert count("turns.index", "--turns", "3") == record["turns"]["cells"]
    assert [c for c in count("index", "--rankers", *RANKERS) if c["length"] == max(LENGTHS)] == record["rankers"][
        "cells"
    ]


def test_a_server_that_does_not_start_ends_the_run(small_model_path: Path, tmp_path: Path) -> None:
    """At once, with the end of its log, and with records that say so."""
    model = tiny_model.build_with_tokenizer(tmp_path, small_model_path)
    (weights,) = model.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    began = time.monotonic()
    ran = run(tmp_path, model, gpus=1, times=None)
    assert ran.returncode == 1 and time.monotonic() - began < SECONDS - FINISH - 60, ran.stdout
    assert "the server exited with status" in ran.stdout and "the end of its log" in ran.stdout
    assert "SafetensorError" in ran.stdout, "what was wrong"
    record = json.loads((tmp_path / "out" / f"{model.name}.json").read_text())
    assert "claa0: the server exited" in record["failures"][0] and "SafetensorError" in record["failures"][0]
    assert not record.get("cells") and (tmp_path / "out" / "raw").is_dir()
