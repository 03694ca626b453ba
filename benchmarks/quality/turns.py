"""Further questions over the same document, in one chat.

A turn's chat has what was said before in it: the document with the first question, the answer that this setting gave,
the next question. So a turn is what a user of this setting would get, its own mistakes included, and it finds the
earlier turns in the prefix cache as a server does. Turns of two settings are paired by their document, and not by
their text, as the answers before them may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import msgspec

from benchmarks.quality.index import Entry
from claa_sglang.tasks.record import Message, Prompt

Graded = Prompt | Entry  # both have what grading needs
P = TypeVar("P", Prompt, Entry)


class TurnsError(ValueError):
    """Prompts have no such turn; the message says what to do."""


class Question(NamedTuple):
    """One turn of a prompt, as it is graded. key: of its answers (`turn_key`)."""

    key: str
    task: str
    source: str
    form: str
    length: int
    turn: int
    answers: list[str]
    exact: bool


def turn_key(key: str, turn: int) -> str:
    """Under which the answer to turn 1, 2, … of a prompt is kept."""
    return key if turn == 1 else f"{key}/{turn}"


def questions(prompts: Sequence[Graded], turns: int) -> list[Question]:
    """The first `turns` turns of every prompt, the follow-ups it lacks left out."""
    return [
        Question(turn_key(one.key, turn), one.task, one.source, one.form, one.length, turn, answers, one.exact)
        for one in prompts
        for turn, answers in enumerate(_expected(one)[:turns], 1)
    ]


def _expected(prompt: Graded) -> list[list[str]]:
    """The answers of every turn."""
    return [prompt.answers, *(one.answers for one in prompt.followups)]


def with_turns(prompts: Sequence[P], turns: int) -> list[P]:
    """Those prompts that have so many turns. Raises TurnsError if none has, or one to be asked is no chat."""
    if turns == 1:
        return list(prompts)
    found = [prompt for prompt in prompts if len(prompt.followups) >= turns - 1]
    if not found:
        raise TurnsError(f"no prompt has {turns - 1} follow-ups: ask for multi-key or the copies in claa-sglang tasks")
    if not all(prompt.messages for prompt in found if isinstance(prompt, Prompt)):
        raise TurnsError("a prompt without messages cannot go on: make the prompts without --token-ids")
    return found


def conversation(prompt: Prompt, said: Sequence[str]) -> Prompt:
    """The chat after the answers `said` to its first turns, with the next question, answer prefix at its end.

    An answer is what the model said after its answer prefix.
    """
    messages, prefix = list(prompt.messages or ()), prompt.answer_prefix
    for answer, one in zip(said, prompt.followups, strict=False):
        messages += [Message("assistant", prefix + answer), Message("user", one.question)]
        prefix = one.answer_prefix
    return msgspec.structs.replace(prompt, messages=messages, answer_prefix=prefix) if said else prompt
