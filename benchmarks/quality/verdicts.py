"""Does a setting hold every task? Read off the differences to dense, task by task and length by length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from benchmarks.quality.statistics import ALL, EVERY_LENGTH, Cell

MARGIN = 0.01  # of accuracy: one point

Verdict = Literal["within 1 point", "interval has 0", "worse"]


class Held(msgspec.Struct, frozen=True):
    """One setting at one length and turn, over all tasks.

    within, interval: tasks whose difference is at least -MARGIN; others whose interval has 0 in it.
    worse: the other tasks, each with its difference and interval in points.
    """

    ranker: str
    keep_rate: float
    length: int
    turn: int
    within: int
    interval: int
    worse: dict[str, list[float]]


def verdict(cell: Cell) -> Verdict:
    """Of a pruned cell. A wide interval has 0 in it easily: it says that the prompts are too few to tell."""
    assert cell.to_dense is not None
    if cell.to_dense.difference.mean >= -MARGIN:
        return "within 1 point"
    return "interval has 0" if cell.to_dense.difference.high >= 0 else "worse"


def judged(cells: Sequence[Cell]) -> list[Cell]:
    """Pruned cells of one task and one length, whatever the source of text and the form."""
    whole = (c for c in cells if c.source == c.form == ALL != c.task and c.length != EVERY_LENGTH)
    return [c for c in whole if c.to_dense is not None]


def held(cells: Sequence[Cell]) -> list[Held]:
    """Of every setting, length and turn."""
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in judged(cells):
        groups[cell.ranker, cell.keep_rate, cell.length, cell.turn].append(cell)
    found = []
    for where, members in groups.items():
        verdicts = [verdict(cell) for cell in members]
        worse = {
            cell.task: [round(100 * end, 1) for end in msgspec.structs.astuple(cell.to_dense.difference)]
            for cell, said in zip(members, verdicts, strict=True)
            if said == "worse" and cell.to_dense is not None
        }
        found.append(Held(*where, verdicts.count("within 1 point"), verdicts.count("interval has 0"), worse))
    return found
