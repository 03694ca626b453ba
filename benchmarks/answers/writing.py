"""The end of a run: answers, index, record and figure of every model, from whatever there is."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from multiprocessing import TimeoutError as NotYet
from multiprocessing.pool import Pool
from typing import TYPE_CHECKING, Any

import msgspec

from benchmarks.answers import merge, prompts
from benchmarks.answers.asking import Failures
from benchmarks.answers.clock import Clock
from benchmarks.answers.prompts import Item
from benchmarks.quality import index

if TYPE_CHECKING:
    from benchmarks.answers.running import Run

RAW = "raw"
LAST = 6.0  # seconds of the deadline that counting leaves for writing


def write(
    told: Run, clock: Clock, pool: Pool, failures: Failures, items: Mapping[str, Mapping[str, Sequence[Item]]]
) -> None:
    """Answers of every model first, as all else can be made of them; counting is given up at the deadline."""
    begun, kept = [], True
    for name in told.plan.models:
        try:
            begun.append(_raw(told, name, items.get(name, {}), pool, failures))
        except Exception as error:  # of one model must not take the other's
            kept = False
            failures.add(f"{name}: merging: {type(error).__name__}: {error}; its files stay in answers/")
    clock.say("answers are written")
    for name, facts, counts in begun:
        try:
            record = _record(told, name, facts, clock, failures) | _counted(name, counts, clock, failures)
            nested = {part: record.pop(part) for part in ("rankers", "turns") if part in record}
            record |= nested | {"failures": failures.found}
            merge.save_record(record, told.out / f"{name}.json")
            _draw(record, told, name, failures)
            clock.say(f"{name}.json: {record.get('answered under every setting', 0)} prompts in every setting")
        except Exception as error:
            kept = False
            failures.add(f"{name}: record: {type(error).__name__}: {error}; count {RAW}/ with eval_quality --index")
    if kept:
        shutil.rmtree(told.out / "answers", ignore_errors=True)


def _raw(told: Run, name: str, made: Mapping[str, Sequence[Item]], pool: Pool, failures: Failures):
    """Write answers and index; begin to count. Returns what `_record` needs."""
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
        return name, facts, {}
    groups = merge.groups(told.plan.models[name], main, chats)
    return name, facts, {group.name: pool.apply_async(merge.count, (group, known)) for group in groups}


def _record(told: Run, name: str, facts: dict[str, Any], clock: Clock, failures: Failures) -> dict[str, Any]:
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


def _counted(name: str, counts: Mapping[str, Any], clock: Clock, failures: Failures) -> dict[str, Any]:
    """Of the model's groups: that of "" by itself, the others under their names."""
    found: dict[str, Any] = {}
    for group, coming in counts.items():
        try:
            counted = coming.get(max(0.5, clock.left() - LAST))
        except NotYet:
            failures.add(f"{name}: no time to count {group or 'answers'}: eval_quality --index does it from {RAW}/")
            continue
        found |= {group: counted} if group else counted
    return found


def _card(told: Run) -> str:
    if told.cpu:
        return "CPU engine"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.splitlines()
        return "; ".join(dict.fromkeys(said))
    return "unknown"


def _draw(record: dict[str, Any], told: Run, name: str, failures: Failures) -> None:
    """Accuracy against TTFT, where both are there, and matplotlib is."""
    if not record.get("cells") or not record.get("ttft") or importlib.util.find_spec("matplotlib") is None:
        return
    try:
        from benchmarks import eval_quality_plot

        eval_quality_plot.draw(record, eval_quality_plot.ALL, eval_quality_plot.ALL, told.out / f"{name}.png")
    except Exception as error:  # the record has all that it shows
        failures.add(f"{name}.png: {type(error).__name__}: {error}")
