"""Which prompts are asked when and where, so that a run that is cut short leaves every cell with as many prompts.

Nothing here reads a clock or a file.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from benchmarks.answers.plan import Rankers, Times
from benchmarks.quality.index import Entry

T = TypeVar("T")


def phases(items: Sequence[T], entry: Callable[[T], Entry], count: int, seed: int) -> list[list[T]]:
    """Half of the longest, all others, the rest of the longest; those that have none are left out.

    items: `count` prompts of each task, form and length, their seeds from `seed` on.
    """
    longest = max(entry(item).length for item in items)
    first, others, rest = [], [], []
    for item in items:
        one = entry(item)
        if one.length < longest:
            others.append(item)
        else:
            (first if one.seed - seed < (count + 1) // 2 else rest).append(item)
    return [phase for phase in (first, others, rest) if phase]


def shards(items: Sequence[T], number: int) -> list[list[T]]:
    """Shuffled, in `number` parts whose sizes differ by at most one."""
    mixed = random.Random(1).sample(items, len(items))
    return [mixed[first::number] for first in range(number)]


def timed(items: Sequence[T], entry: Callable[[T], Entry], times: Times, seed: int) -> dict[int, list[T]]:
    """The first prompts of the tasks and lengths that are timed, by length, longest first."""
    found: dict[int, list[T]] = {}
    for item in items:
        one = entry(item)
        wanted = one.length in times.lengths or not times.lengths
        if wanted and one.task in times.tasks and one.seed - seed < times.prompts:
            found.setdefault(one.length, []).append(item)
    return dict(sorted(found.items(), reverse=True))


def ranked(items: Sequence[T], entry: Callable[[T], Entry], rankers: Rankers, count: int, seed: int) -> list[T]:
    """The last prompts of one length, which several rankers are asked for."""
    return [
        item
        for item in items
        if entry(item).length == rankers.length and entry(item).seed - seed >= count - rankers.prompts
    ]
