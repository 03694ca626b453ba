"""Prompts of a made-up plan, for the tests of `benchmarks.answers_run`."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from benchmarks.answers.prompts import Item
from benchmarks.quality.index import Entry

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
