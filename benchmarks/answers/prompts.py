"""Prompts of all models, made in processes of their own, with what is on their index."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from functools import cache
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.answers.plan import Model, Plan
from benchmarks.quality import index
from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.generate import TaskError, make
from claa_sglang.tasks.record import PREFIX

ANSWERS, TURNS, TIMES = "answers", "turns", "times"  # what prompts are for; TIMES: for nothing else
PER_CHUNK = 25
# Each process is one of many: no library in it may take all cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Chunk(NamedTuple):
    """`count` prompts from `seed` on. model: name in the plan. path: of its directory. use: ANSWERS, TURNS or TIMES."""

    model: str
    path: Path
    use: str
    task: str
    length: int
    form: str
    source: str
    seed: int
    count: int

    def __str__(self) -> str:
        return f"{self.model}: {self.task} of {self.length} tokens, {self.form} ({self.source}), from seed {self.seed}"


class Item(NamedTuple):
    """One prompt. line: of the JSONL file, without its end."""

    entry: index.Entry
    line: bytes


class Made(NamedTuple):
    """A chunk's prompts, or why there are none."""

    chunk: Chunk
    items: list[Item]
    error: str = ""


def chunks(plan: Plan, paths: Mapping[str, Path]) -> list[Chunk]:
    """Everything to be made; the longest first, as they take longest."""
    found = []
    for name, model in plan.models.items():
        for form, source in plan.sources.items():
            for task in model.tasks:
                for length in model.lengths:
                    for seed, count in _ranges(model.seed, model.count):
                        found.append(Chunk(name, paths[name], ANSWERS, task, length, form, source, seed, count))
        found += _timed(name, paths[name], model, plan.sources)
        found += _turns(name, paths[name], model, next(iter(plan.sources.items())))
    return sorted(found, key=lambda chunk: -chunk.length)


def samples(plan: Plan, paths: Mapping[str, Path]) -> list[Chunk]:
    """One prompt of every task and form at its shortest length: what cannot be made shows in them."""
    shortest: dict[tuple[str, ...], Chunk] = {}
    for chunk in chunks(plan, paths):  # longest first
        shortest[chunk.model, chunk.use, chunk.task, chunk.form] = chunk._replace(count=1)
    return list(shortest.values())


def _timed(name: str, path: Path, model: Model, sources: Mapping[str, str]) -> Iterator[Chunk]:
    for length in model.only_timed:
        assert model.times is not None
        for task in model.times.tasks:
            for form, source in sources.items():
                yield Chunk(name, path, TIMES, task, length, form, source, model.seed, model.times.prompts)


def _turns(name: str, path: Path, model: Model, form: tuple[str, str]) -> Iterator[Chunk]:
    if model.turns is None:
        return
    for task in model.turns.tasks:
        for length in model.turns.lengths:
            for seed, count in _ranges(model.turns.seed, model.turns.count):
                yield Chunk(name, path, TURNS, task, length, *form, seed, count)


def _ranges(seed: int, count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, PER_CHUNK):
        yield seed + first, min(PER_CHUNK, count - first)


def pool(processes: int) -> Pool:
    """Of fresh processes, as this one has threads. Its `terminate` ends them at once."""
    return multiprocessing.get_context("spawn").Pool(processes, initializer=_alone)


def _alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the run, which still counts in these processes
    os.environ.update(ONE_THREAD)


def make_chunk(chunk: Chunk) -> Made:
    """Runs in a process of the pool. Turns stay chats, others become token ids."""
    try:
        tokenizer = _tokenizer(chunk.path)
        return Made(chunk, [_item(tokenizer, chunk, seed) for seed in range(chunk.seed, chunk.seed + chunk.count)])
    except Exception as error:  # a chunk that fails must not take the others with it
        return Made(chunk, [], f"{type(error).__name__}: {error}")


def _item(tokenizer: Any, chunk: Chunk, seed: int) -> Item:
    prompt = make(tokenizer, chunk.task, chunk.length, chunk.source, seed, chunk.form == PREFIX)
    if prompt.form != chunk.form:
        raise TaskError(f"{chunk.task} made a prompt of the form {prompt.form}")
    if chunk.use != TURNS:
        prompt = msgspec.structs.replace(prompt, messages=None, input_ids=token_ids(prompt, tokenizer), followups=[])
    return Item(index.of(prompt), msgspec.json.encode(prompt))


@cache
def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
