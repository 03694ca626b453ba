"""The end of a run: answers, index, record and figure of every model, from whatever there is."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from multiprocessing import TimeoutError as NotYet
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from benchmarks.answers import merge, prompts
from benchmarks.answers.asking import Failures
from benchmarks.answers.clock import Clock
from benchmarks.answers.prompts import Item
from benchmarks.quality import index
from benchmarks.quality.answers import Known
from benchmarks.quality.index import Entry

if TYPE_CHECKING:
    from benchmarks.answers.running import Run

RAW = "raw"
LAST = 6.0  # seconds of the deadline that counting leaves for writing


def write(
    told: Run, clock: Clock, pool: Pool, failures: Failures, items: Mapping[str, Mapping[str, Sequence[Item]]]
) -> None:
    """Answers of every model first, as all else can be made of them; counting is given up at the deadline."""
    before = len(failures.found)
    facts: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, AsyncResult[dict[str, Any]]]] = {}
    for name in told.plan.models:
        facts[name], counts[name] = {}, {}
        with _noted(f"{name}: merging", failures):
            known, facts[name], entries = _raw(told, name, items.get(name, {}), failures)
            for group in merge.groups(told.plan.models[name], *entries) if known else []:
                counts[name][group.name] = pool.apply_async(merge.count, (group, known))
    clock.say("answers are written")
    for name in told.plan.models:
        with _noted(f"{name}: record", failures):
            record = _record(told, name, facts[name], clock)
            parts = _counted(name, counts[name], clock, failures)
            record |= parts.pop("", {}) | parts | {"failures": failures.found}
            merge.save_record(record, told.out / f"{name}.json")
            clock.say(f"{name}.json: {record.get('answered under every setting', 0)} prompts in every setting")
            with _noted(f"{name}.png", failures):  # the record has all that it shows
                _draw(record, told.out / f"{name}.png")
    if len(failures.found) == before:
        shutil.rmtree(told.out / "answers", ignore_errors=True)


@contextlib.contextmanager
def _noted(what: str, failures: Failures) -> Iterator[None]:
    """A part that fails must not take the others with it."""
    try:
        yield
    except Exception as error:
        failures.add(f"{what}: {type(error).__name__}: {error}; answers/ is left as it is")


def _raw(
    told: Run, name: str, made: Mapping[str, Sequence[Item]], failures: Failures
) -> tuple[Known, dict[str, Any], tuple[list[Entry], list[Entry]]]:
    """Write answers and index. Returns the answers, the server's facts, and the entries of prompts and of chats."""
    known, facts, wrong = merge.answers_of((told.out / "answers" / name).glob("*.answers.jsonl"))
    for one in wrong:
        failures.add(f"{name}: {one}")
    main, chats = ([item.entry for item in made.get(use, [])] for use in (prompts.ANSWERS, prompts.TURNS))
    raw = told.out / RAW
    merge.save_raw(known, facts, raw / f"{name}.answers.jsonl.xz")
    index.save(main, raw / f"{name}.index.jsonl.xz")
    if chats:  # an index of their own: their first questions are no prompts of the others' table
        index.save(chats, raw / f"{name}.turns.index.jsonl.xz")
    if not known:
        failures.add(f"{name}: nothing was answered")
    return known, facts, (main, chats)


def _record(told: Run, name: str, facts: dict[str, Any], clock: Clock) -> dict[str, Any]:
    return {
        "command": told.command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "card": _card(told),
        "host": f"{platform.processor() or platform.machine()}, {told.gpus} {'lanes' if told.cpu else 'GPUs'}",
        "model": name,
        **facts,
        "seconds": round(clock.passed, 1),
        "plan": msgspec.to_builtins(told.plan.models[name]),
        "sources": told.plan.sources,
        **merge.measured((told.out / "answers" / name).glob("*.json")),
    }


def _counted(
    name: str, counts: Mapping[str, AsyncResult[dict[str, Any]]], clock: Clock, failures: Failures
) -> dict[str, Any]:
    """Of the model's groups, by name."""
    found: dict[str, Any] = {}
    for group, coming in counts.items():
        try:
            found[group] = coming.get(max(0.5, clock.left() - LAST))
        except NotYet:
            failures.add(f"{name}: no time to count {group or 'answers'}: eval_quality --index does it from {RAW}/")
        except Exception as error:
            failures.add(f"{name}: counting {group or 'answers'}: {type(error).__name__}: {error}")
    return found


def _card(told: Run) -> str:
    if told.cpu:
        return "CPU engine"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.splitlines()
        return "; ".join(dict.fromkeys(said))
    return "unknown"


def _draw(record: dict[str, Any], path: Path) -> None:
    """Accuracy against TTFT, where both are there, and matplotlib is."""
    if not record.get("cells") or not record.get("ttft") or importlib.util.find_spec("matplotlib") is None:
        return
    from benchmarks import eval_quality_plot

    eval_quality_plot.draw(record, eval_quality_plot.ALL, eval_quality_plot.ALL, path)
