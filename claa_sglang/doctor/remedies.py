"""From flags with which a server would not start to flags with which it would: each change is tried, not promised."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

Words = tuple[str, ...]
# What a remedy names: a flag, or a flag with a value, or with several in braces to choose from.
_NAMED = re.compile(r"(--[a-z][a-z0-9-]*)(?:[= ](\{[^}]*\}|[a-z0-9_]+(?:\.[a-z0-9_]+)*))?")
TRIES = 200


def startable(words: Sequence[str], problems: Callable[[Words], Sequence[str]]) -> Words | None:
    """Flags near `words` that have no problems; None where none were found.

    problems: what speaks against a start, a line each, which may name flags; may raise for flags that are no flags.
    """
    current, left = tuple(words), TRIES
    against = problems(current)
    while against:
        for changed in _changes(current, against):
            left -= 1
            if left < 0:
                return None
            try:
                then = problems(changed)
            except (Exception, SystemExit):  # noqa: BLE001
                continue
            if len(then) < len(against):
                current, against = changed, then
                break
        else:
            return None
    return current


def _changes(words: Words, against: Sequence[str]) -> Iterator[Words]:
    """One change at a time: what the problems name first, then any flag left out."""
    named = [(flag, value) for problem in against for flag, value in _NAMED.findall(problem.partition("Remedy")[2])]
    for flag, _ in named:
        yield from (shorter for shorter in [_without(words, flag)] if shorter != words)
    for flag, value in named:
        for one in re.split(r"[,{}]+", value):
            if one:
                yield (*_without(words, flag), flag, one)
    for flag in dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--")):
        yield _without(words, flag)


def _without(words: Words, flag: str) -> Words:
    """The words without a flag and its values."""
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0] == flag
        if not dropping:
            kept.append(word)
    return tuple(kept)
