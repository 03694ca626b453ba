"""The file of results: what is on record of a run, short enough to be kept in a repository."""

from __future__ import annotations

import contextlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.quality.answers import Answer, Known
from benchmarks.quality.settings import Setting
from benchmarks.quality.statistics import ALL, EVERY_LENGTH, Cell
from benchmarks.quality.turns import Graded
from benchmarks.quality.verdicts import held
from claa_sglang.offline.interval import Interval

LIMIT = 300_000  # bytes of a file
DIGITS = 4  # of a float
SERVER = ("dtype", "attention_backend", "chunked_prefill_size", "context_length")


def facts_of(info: dict[str, Any]) -> dict[str, Any]:
    """What answers depend on: the model, CLAA's configuration, and versions. Holds no path."""
    names = ("claa-sglang", "sglang", "torch", "transformers", "scipy")
    config = info["claa"]["config"]
    return {
        "model": Path(info["model_path"]).name,
        "claa": {**config, "profile": Path(config["profile"]).name if config["profile"] else None},
        "server": server_of(info),
        "versions": {name: _version(name) for name in names} | {"python": platform.python_version()},
    }


def server_of(info: dict[str, Any]) -> dict[str, Any]:
    return {name: info.get(name) for name in SERVER}


def settings_of(settings: Sequence[Setting], answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Each setting with the ranker that its first answer's report names: `claa` is whatever the server has."""
    ran: dict[str, str | None] = {}
    for answer in answers:
        ran.setdefault(answer.setting, answer.ranker)
    return [
        {"ranker": one.ranker, "keep_rate": one.keep_rate, "ran": ran.get(one.name)}
        for one in settings
        if not one.dense
    ]


def counted(
    prompts: Sequence[Graded],
    known: Known,
    wanted: Sequence[Setting],
    found: Sequence[Cell],
    turns: int = 1,
    sources_too: bool = False,
) -> dict[str, Any]:
    """What is on record of answers. found: `statistics.cells` of the same prompts, answers, settings and turns."""
    whole = [c for c in found if c.task == c.source == c.form == ALL and c.length != EVERY_LENGTH and c.turn == 1]
    forms = Counter(prompt.form for prompt in prompts)
    return {
        "prompts": {
            "count": len(prompts),
            "tasks": dict(Counter(prompt.task for prompt in prompts)),
            "forms": dict(forms),
        },
        "answered under every setting": sum({cell.length: cell.n for cell in whole}.values()),
        "turns": turns,
        "settings": settings_of(wanted, known.values()),
        "held": msgspec.to_builtins(held(found)),
        "cells": rows_of(found, sources_too),
    }


def rows_of(cells: Sequence[Cell], sources_too: bool) -> list[dict[str, Any]]:
    """Cells without what is not there, nor `turn` where it is the first, nor `form` where it is all.

    An interval is [mean, low, high].

    Without `sources_too`, cells of a single source are left out, and a single task's agreement and divergence.
    """
    rows = []
    for cell in cells:
        if cell.source != ALL and not sources_too:
            continue
        row = _plain(cell)
        if cell.task != ALL and not sources_too and cell.to_dense is not None:
            for name in ("agreement", "first_token_kl", "first_token_n"):
                row["to_dense"].pop(name, None)
        if cell.turn == 1:
            del row["turn"]
        if cell.form == ALL:
            del row["form"]
        rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return [value.mean, value.low, value.high]
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.asdict(value)
        return {name: _plain(inner) for name, inner in fields.items() if inner is not None}
    return value


def text_of(record: dict[str, Any]) -> str:
    """As JSON, a line for each entry of a list, and floats to DIGITS digits: there are hundreds of cells."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.{DIGITS}g}")
        if isinstance(value, dict):
            return {name: rounded(inner) for name, inner in value.items()}
        return [rounded(inner) for inner in value] if isinstance(value, list) else value

    def line(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    def lines(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(map(line, value)) + "\n]"
        if isinstance(value, dict) and any(isinstance(inner, list) for inner in value.values()):
            return fields(value)
        return line(value)

    def fields(value: dict[str, Any]) -> str:
        return "{\n" + ",\n".join(f"{json.dumps(name)}: {lines(inner)}" for name, inner in value.items()) + "\n}"

    return fields(rounded(record)) + "\n"


def write(record: dict[str, Any], path: Path) -> None:
    """Raises OSError. A file above LIMIT is written, and a line says how to have a shorter one."""
    text = text_of(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if len(text) > LIMIT:
        print(
            f"{path}: {len(text):,} bytes, more than {LIMIT:,}: leave out --sources-too, or ask fewer settings a file"
        )


def _version(name: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None
