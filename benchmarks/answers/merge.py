"""What a run leaves: of each model all answers in one file with their index, and a record that counts them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.answers.lanes import OWN
from benchmarks.answers.plan import Model
from benchmarks.quality import files, recording
from benchmarks.quality.answers import Answer, AnswersError, Known, read
from benchmarks.quality.index import Entry
from benchmarks.quality.settings import settings
from benchmarks.quality.statistics import ALL, cells
from benchmarks.quality.turns import with_turns


class Group(NamedTuple):
    """Answers that are counted together. name: key in the record, "" for the record itself."""

    name: str
    entries: list[Entry]
    rankers: list[str]
    rates: list[float]
    turns: int = 1


def answers_of(paths: Iterable[Path]) -> tuple[Known, dict[str, Any], list[str]]:
    """All answers of one model's files, the server's facts, and what could not be used, in words.

    Several servers may have answered, if they are alike. Of a prompt and setting that was asked twice, the answer of
    the first file counts.
    """
    known: Known = {}
    facts: dict[str, Any] = {}
    wrong = []
    for path in sorted(paths):
        try:
            found, said = read(path)
        except (AnswersError, msgspec.DecodeError) as error:
            wrong.append(f"{path.name}: {error}")
            continue
        facts = facts or said
        if said != facts:
            differ = sorted(name for name in {*said, *facts} if said.get(name) != facts.get(name))
            wrong.append(f"{path.name}: answers of another server ({', '.join(differ)} differ) are left out")
            continue
        known = {**found, **known}
    return known, facts, wrong


def save_raw(known: Known, facts: dict[str, Any], path: Path) -> None:
    """As `eval_quality --answers` reads them."""
    lines: list[dict[str, Any] | Answer] = [facts, *(known[key] for key in sorted(known))]
    files.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines), path)


def groups(model: Model, main: list[Entry], chats: list[Entry]) -> list[Group]:
    """What is counted: every prompt by the server's own ranker; several rankers, where they were asked; chats."""
    found = [Group("", main, [OWN], model.rates)]
    if model.rankers:
        some = [one for one in main if one.length == model.rankers.length]
        found.append(Group("rankers", some, model.rankers.rankers, model.rankers.rates))
    if model.turns and chats:
        found.append(Group("turns", with_turns(chats, model.turns.turns), [OWN], model.turns.rates, model.turns.turns))
    return found


def count(group: Group, known: Known) -> dict[str, Any]:
    """The part of a record about one group. Takes seconds: bootstrap over prompts, for hundreds of cells."""
    wanted = settings(group.rankers, group.rates)
    names = {one.name for one in wanted}
    mine = {where: answer for where, answer in known.items() if where[1] in names}
    found = cells(group.entries, mine, wanted, group.turns)
    return recording.counted(group.entries, mine, wanted, found, group.turns)


def measured(paths: Iterable[Path]) -> dict[str, Any]:
    """Times and kept sets of the results in which something was timed, one for each length."""
    found: dict[str, Any] = {"ttft": [], "kept_sets": []}
    for path in sorted(paths):
        try:
            result = json.loads(path.read_text())
        except ValueError:  # it was being written when its step was ended
            continue
        found["device"] = result["device"]
        if result["ttft"]:
            found |= {name: result[name] for name in ("stock", "timed") if name in result}
            for name in ("ttft", "kept_sets"):
                found[name] += result[name]
    for name in ("ttft", "kept_sets"):
        found[name].sort(key=lambda one: one["length"])
    return found


def save_record(record: dict[str, Any], path: Path) -> None:
    """Below `recording.LIMIT`: where it would be longer, cells of a single form are left out. Raises OSError."""
    if len(recording.text_of(record)) > recording.LIMIT:
        parts = [record, *(record[name] for name in ("rankers", "turns") if name in record)]
        for part in parts:
            part["cells"] = [cell for cell in part["cells"] if cell.get("form", ALL) == ALL]
        record["left out"] = "cells of a single form; eval_quality counts them from the answers"
    recording.write(record, path)
