"""Filler text that grows word by word, with other sentences placed in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Placed(NamedTuple):
    """A sentence and where it goes: depth 0 is before the text, 1 after it."""

    depth: float
    sentence: str


class Filler:
    """Sentences of one source, read once and kept, so that a longer text begins like a shorter one."""

    def __init__(self, sentences: Iterator[str]):
        self._source = sentences
        self._read: list[str] = []

    def take(self, words: int) -> list[str]:
        """Sentences of so many words in all; the last may be cut off, so that a text can have any length."""
        taken: list[str] = []
        while words > 0:
            if len(taken) == len(self._read):
                self._read.append(next(self._source))
            sentence = self._read[len(taken)].split()[:words]
            taken.append(" ".join(sentence))
            words -= len(sentence)
        return taken


def place(filler: Sequence[str], placed: Sequence[Placed]) -> str:
    """`filler` with each placed sentence at its depth, between two sentences, as one text."""
    text = list(filler)
    for depth, sentence in sorted(placed, reverse=True):  # from the end, so that places before it stay where they are
        text.insert(round(depth * len(filler)), sentence)
    return " ".join(text)
