"""What is asked of which server: one command of `benchmarks.eval_quality` for each step.

Times come first, one after the other and with nothing else on their card, or on the host (`Plan.quiet`). Then rankers
and turns run on the last card of their model, and every card takes shards of the model's prompts, in the order of
phases, until there are no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.answers import phases
from benchmarks.answers.plan import Model
from benchmarks.answers.prompts import ANSWERS, TIMES, TURNS, Item

OWN = "claa"  # the server's ranker
SHARDS, LEAST = 2, 4  # of a phase, for each card; prompts in one
ASKING = 2  # processes for each card and model: while one starts or ends, the other keeps the card busy


class Step(NamedTuple):
    """One run of `eval_quality`. name: unique. items: its prompts. flags: besides prompts, servers, time and files."""

    name: str
    items: Sequence[Item]
    flags: tuple[str, ...]
    stock: bool = False
    turns: bool = False


class Work(NamedTuple):
    """Of one model. times: on its first card, alone. special: on its last. shards: on all."""

    times: list[Step]
    special: list[Step]
    shards: list[Step]


def work(name: str, model: Model, items: Mapping[str, Sequence[Item]], gpus: int) -> Work:
    """items: by ANSWERS, TURNS and TIMES; what could not be made may be missing."""
    main, chats = list(items.get(ANSWERS, [])), list(items.get(TURNS, []))
    may_be_timed = [*main, *items.get(TIMES, [])]
    times, special, shards = [], [], []
    if model.times and may_be_timed:
        ours = model.times
        more = ("--time", "--rounds", str(ours.rounds), "--kept-sets", str(ours.kept_sets))
        flags = (*_settings(ours.rankers, ours.rates), "--in-flight", "8", *more)
        for length, some in phases.timed(may_be_timed, _entry, ours, model.seed).items():
            times.append(Step(f"{name}.times{length}", some, flags, stock=True))
    if model.rankers and main:
        some = phases.ranked(main, _entry, model.rankers, model.count, model.seed)
        flags = (*_settings(model.rankers.rankers, model.rankers.rates), "--in-flight", str(model.in_flight))
        special += [Step(f"{name}.rankers", some, flags)] if some else []
    if model.turns and chats:
        flags = (*_settings([OWN], model.turns.rates), "--in-flight", str(model.in_flight))
        special.append(Step(f"{name}.turns", chats, (*flags, "--turns", str(model.turns.turns)), turns=True))
    most = SHARDS * len(model.placed(gpus))
    flags = (*_settings([OWN], model.rates), "--in-flight", str(max(1, model.in_flight // ASKING)))
    for phase, some in enumerate(phases.phases(main, _entry, model.count, model.seed) if main else []):
        shards += [
            Step(f"{name}.phase{phase}.{place}", shard, flags)
            for place, shard in enumerate(phases.shards(some, min(most, math.ceil(len(some) / LEAST))))
        ]
    return Work(times, special, shards)


def _entry(item: Item):
    return item.entry


def _settings(rankers: Sequence[str], rates: Sequence[float]) -> tuple[str, ...]:
    return ("--rankers", *rankers, "--keep-rates", *(f"{rate:g}" for rate in rates), "--kl-prompts", "0", "--ask-only")


def command(step: Step, prompts: Path, home: Path, url: str, stock_url: str | None, seconds: float) -> list[str]:
    """Arguments of `eval_quality`, every path absolute. home: of the step's result and answers."""
    files = ["--out", str(home / f"{step.name}.json"), "--answers", str(home / f"{step.name}.answers.jsonl")]
    stock = ["--stock-url", stock_url] if step.stock and stock_url else []
    return [str(prompts), "--url", url, *step.flags, *stock, "--seconds", f"{max(1.0, seconds):.0f}", *files]
