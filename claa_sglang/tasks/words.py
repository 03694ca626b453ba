"""Names and values that are hidden in texts: wonderwords' words, numbers and UUIDs, seeded."""

from __future__ import annotations

import random
import uuid
from functools import cache

KINDS = ("number", "word", "uuid")  # of values


class MissingPackageError(ImportError):
    """A package that only the tasks need is not installed; the message says how to install it."""


@cache
def _words(category: str) -> tuple[str, ...]:
    """wonderwords' words of a category ("noun", "adjective" or "verb") that are one lower-case word each."""
    try:
        import wonderwords
    except ImportError as error:
        raise MissingPackageError("words come from the wonderwords package: pip install wonderwords") from error
    found = wonderwords.RandomWord().filter(include_categories=[category], regex="[a-z]{3,10}")
    return tuple(sorted(set(wonderwords.filter_profanity(found))))


def words(rng: random.Random, count: int, category: str = "noun") -> list[str]:
    """So many different words. Raises ValueError if the category has fewer."""
    return rng.sample(_words(category), count)


def names(rng: random.Random, count: int) -> list[str]:
    """So many names like "wild-harbor", no two with a word in common."""
    pairs = zip(words(rng, count, "adjective"), words(rng, count, "noun"), strict=True)
    return [f"{adjective}-{noun}" for adjective, noun in pairs]


def values(rng: random.Random, count: int, kind: str) -> list[str]:
    """So many different values: numbers of seven digits, words like "wild-harbor", or UUIDs. kind: one of KINDS."""
    match kind:
        case "number":
            return [str(value) for value in rng.sample(range(1_000_000, 10_000_000), count)]
        case "word":
            return names(rng, count)
        case "uuid":
            return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]
    raise ValueError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
