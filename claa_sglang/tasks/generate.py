"""Prompts of every task, length and source asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from claa_sglang.tasks.copies import copy_code, copy_links, copy_quote
from claa_sglang.tasks.counting import common_words
from claa_sglang.tasks.draft import Draft
from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.filler import Filler
from claa_sglang.tasks.fit import FitError, fit
from claa_sglang.tasks.needles import needles
from claa_sglang.tasks.passages import passages
from claa_sglang.tasks.record import Message, Prompt
from claa_sglang.tasks.sources import SourceError, sentences
from claa_sglang.tasks.tracking import tracking
from claa_sglang.tasks.words import MissingPackageError

Task = Callable[[random.Random, Filler], Draft]

TASKS: dict[str, Task] = {
    "needle-number": partial(needles, kind="number"),
    "needle-word": partial(needles, kind="word"),
    "needle-uuid": partial(needles, kind="uuid"),
    "multi-key": partial(needles, keys=4),
    "multi-value": partial(needles, values=4),
    "multi-query": partial(needles, keys=4, queries=4),
    "tracking": tracking,
    "common-words": common_words,
    "passages": passages,
    "copy-code": copy_code,
    "copy-quote": copy_quote,
    "copy-links": copy_links,
}
# Tasks that have a list instead of a text; their prompts are made once, whatever the sources.
WITHOUT_FILLER = {"common-words": "words"}

ANSWER_ROOM, ANSWER_MARGIN = 1.25, 8  # tokens for an answer: of the expected answers' own, and besides
INTRODUCTION = 32  # tokens besides, for a model that has to begin its answer itself


class TaskError(ValueError):
    """The prompts asked for cannot be made; the message says why and what to do."""


def generate(
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    sources: Sequence[str],
    count: int,
    seed: int = 0,
    prefix: bool = True,
) -> Iterator[Prompt]:
    """`count` prompts of each task, length and source; their seeds are `seed`, `seed + 1`, … .

    tokenizer: a Hugging Face one with a chat template. tasks: keys of TASKS. sources: see `sources`.
    lengths: in tokens of the whole prompt, chat template and answer prefix included; a prompt has 97 to 100 % of it.
    prefix: the beginning of the answer is already said; without it a prompt ends as a chat does, with the template.
    A prompt depends on its own task, source, length and seed only, and not on the others asked for. Raises TaskError,
    before the first prompt where it can.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise TaskError(f"no task {unknown[0]!r}: use {', '.join(TASKS)}")
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError("this tokenizer has no chat template: name an instruct or chat model")
    for name in sources:
        _checked(partial(sentences, name, random.Random(0)))
    return _generate(tokenizer, tasks, lengths, sources, count, seed, prefix)


def total(tasks: Sequence[str], lengths: Sequence[int], sources: Sequence[str], count: int) -> int:
    """How many prompts `generate` makes."""
    return count * len(lengths) * sum(1 if task in WITHOUT_FILLER else len(sources) for task in tasks)


def _generate(
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    sources: Sequence[str],
    count: int,
    seed: int,
    prefix: bool,
) -> Iterator[Prompt]:
    for task in tasks:
        for length in lengths:
            for source in sources[:1] if task in WITHOUT_FILLER else sources:
                for one in range(seed, seed + count):
                    yield _checked(partial(make, tokenizer, task, length, source, one, prefix))


def make(tokenizer: Any, task: str, length: int, source: str, seed: int, prefix: bool = True) -> Prompt:
    """One prompt. Raises FitError, SourceError, MissingPackageError; KeyError for an unknown task."""
    label = WITHOUT_FILLER.get(task, Path(source).stem)
    # One generator for the question and one for the text: how much text is read must not change the question.
    name = f"{task}/{label}/{length}/{seed}"
    draft = TASKS[task](random.Random(name), Filler(sentences(source, random.Random(f"text of {name}"))))

    def prompt(size: int) -> Prompt:
        return Prompt(
            task=task,
            source=label,
            length=length,
            seed=seed,
            messages=[Message("user", draft.render(size))],
            answers=draft.answers,
            exact=draft.exact,
            answer_prefix=draft.answer_prefix if prefix else "",
            needles=draft.needles,
            max_new_tokens=room,
            followups=[one if prefix else msgspec.structs.replace(one, answer_prefix="") for one in draft.followups],
        )

    room = _room(tokenizer, draft, prefix)
    return prompt(fit(lambda size: len(token_ids(prompt(size), tokenizer)), length))


def _room(tokenizer: Any, draft: Draft, prefix: bool) -> int:
    """Tokens for an answer. What is copied has more than its answers: indentation, dashes, line breaks."""

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    room = round(ANSWER_ROOM * tokens(draft.needles[0] if draft.exact else ", ".join(draft.answers))) + ANSWER_MARGIN
    return room if prefix else room + tokens(draft.answer_prefix) + INTRODUCTION


def _checked(make_one: Callable[[], Any]) -> Any:
    try:
        return make_one()
    except (FitError, SourceError, MissingPackageError) as error:
        raise TaskError(str(error)) from error
