"""Sources of filler text. Layers chosen on one kind of text often fail on another, so there are several.

| source | text |
|---|---|
| `prose` | news articles by many writers: the Lee background corpus (Lee, Pincombe and Welsh, 2005; 300 articles of the Australian Broadcasting Corporation, 60,000 words), read from the gensim package, which ships it |
| `repeated` | five short sentences again and again, as in RULER's noise: only what is hidden stands out |
| `sentences` | grammatical nonsense of wonderwords' words, hardly ever the same sentence twice |
| a file name | any plain-text file of yours, UTF-8; its paragraphs are shuffled |

Articles and paragraphs come in a random order and whole. A prompt longer than the source gets it again in another order.
"""  # noqa: E501

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from claa_sglang.tasks.words import MissingPackageError, words

REPEATED = (
    *("The grass is green.", "The sky is blue.", "The sun is yellow."),
    *("Here we go.", "There and back again."),
)
# A sentence ends with its mark, and a closing quote, before a capital. Where an abbreviation misleads this, a needle
# lands in the middle of a sentence, and nothing else depends on it.
_BETWEEN_SENTENCES = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))\s+(?=[\"'(]*[A-Z])")


class SourceError(ValueError):
    """A source of text is not there; the message says what to do."""


def sentences(source: str, rng: random.Random) -> Iterator[str]:
    """Sentences of a source, without end, in an order that `rng` decides. Raises SourceError, MissingPackageError."""
    make = SOURCES.get(source)
    if make is not None:
        return make(rng)
    if not Path(source).is_file():
        raise SourceError(f"no source of text {source!r}: use {', '.join(SOURCES)} or the name of a plain-text file")
    return _shuffled(_paragraphs(Path(source)), rng)


def _prose(rng: random.Random) -> Iterator[str]:
    return _shuffled(_articles(), rng)


def _repeated(rng: random.Random) -> Iterator[str]:
    while True:
        yield from REPEATED


def _nonsense(rng: random.Random) -> Iterator[str]:
    """wonderwords has sentences of its own, but draws them from generators that cannot be seeded."""
    while True:
        (verb,), (adjective, other) = words(rng, 1, "verb"), words(rng, 2, "adjective")
        subject, thing, place = words(rng, 3)
        kind = rng.randrange(3)
        if kind == 0:
            yield f"The {adjective} {subject} will {verb} the {thing}."
        elif kind == 1:
            yield f"Near the {place}, a {adjective} {subject} can {verb} every {other} {thing}."
        else:
            yield f"Did the {subject} {verb} some {thing} at the {other} {place}?"


SOURCES: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "prose": _prose,
    "repeated": _repeated,
    "sentences": _nonsense,
}


def _shuffled(documents: tuple[tuple[str, ...], ...], rng: random.Random) -> Iterator[str]:
    while True:
        for document in rng.sample(documents, len(documents)):
            yield from document


@cache
def _articles() -> tuple[tuple[str, ...], ...]:
    package = importlib.util.find_spec("gensim")  # found, not imported
    if package is None or package.origin is None:
        raise MissingPackageError("the source `prose` is a file of the gensim package: pip install --no-deps gensim")
    corpus = Path(package.origin).parent / "test" / "test_data" / "lee_background.cor"
    if not corpus.is_file():
        raise SourceError(f"this gensim lacks {corpus.name}: pip install --no-deps gensim==4.4.0")
    # One article a line; seven are there twice.
    return tuple(
        _split(line) for line in dict.fromkeys(corpus.read_text(encoding="utf-8").splitlines()) if line.strip()
    )


@cache
def _paragraphs(path: Path) -> tuple[tuple[str, ...], ...]:
    text = path.read_text(encoding="utf-8")
    found = tuple(_split(paragraph) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())
    if not found:
        raise SourceError(f"{path}: no text in it")
    return found


def _split(text: str) -> tuple[str, ...]:
    return tuple(sentence for sentence in _BETWEEN_SENTENCES.split(" ".join(text.split())) if sentence)
