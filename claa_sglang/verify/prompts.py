"""Prompts that no server has seen: texts where it has a tokenizer, token ids where it has none."""

from __future__ import annotations

import random
from typing import NamedTuple, Protocol

from claa_sglang.tasks.filler import Filler, Placed, place
from claa_sglang.tasks.sources import sentences
from claa_sglang.tasks.words import MissingPackageError
from claa_sglang.verify.client import Prompt

QUESTIONS = ("\n\nIn one sentence, this text is about", "\n\nThe first thing in this text that has a name is")
NAMES = "apple river stone candle violin harbor meadow tiger planet copper silver garden".split()
QUESTION_TOKENS = 24  # of token ids; more than most windows would hide what comes before


class Pair(NamedTuple):
    """Two questions about one text."""

    first: Prompt
    second: Prompt


class Needle(NamedTuple):
    """A prompt that hides a number. answers: what a right answer contains. room: generated tokens."""

    prompt: Prompt
    answers: list[str]
    room: int
    depth: float | None = None


class Prompts(Protocol):
    """Makes prompts of about so many tokens; no two begin alike."""

    kind: str

    def pair(self, tokens: int) -> Pair: ...

    def needles(self, tokens: int, count: int) -> list[Needle]: ...


class Ids:
    """Random token ids. vocabulary: ids of the model, 0 to vocabulary - 1. run: names the run, and makes them its own.

    The first ids are left out, among which most vocabularies have their special tokens.
    """

    kind = "random token ids"

    def __init__(self, vocabulary: int, run: str):
        self._rng = random.Random(run)
        self._ids = range(min(16, vocabulary // 2), vocabulary)

    def pair(self, tokens: int) -> Pair:
        text = self._draw(max(1, tokens - QUESTION_TOKENS))
        first, second = (text + self._draw(QUESTION_TOKENS) for _ in QUESTIONS)
        return Pair({"input_ids": first}, {"input_ids": second})

    def needles(self, tokens: int, count: int) -> list[Needle]:
        """None: a question needs words."""
        return []

    def _draw(self, count: int) -> list[int]:
        return self._rng.choices(self._ids, k=count)


class Texts:
    """Prose with the run's name before it. per_word: tokens of a word of it, which a first request tells."""

    kind = "texts"

    def __init__(self, run: str, per_word: float = 1.5):
        self._run, self._made = run, 0
        self.per_word = per_word

    def pair(self, tokens: int) -> Pair:
        text = self._beginning() + " ".join(self._filler().take(self._words(tokens)))
        first, second = (text + question for question in QUESTIONS)
        return Pair({"text": first}, {"text": second})

    def sample(self, words: int) -> Prompt:
        """A text of so many words, to count its tokens."""
        return {"text": self._beginning() + " ".join(self._filler().take(words))}

    def needles(self, tokens: int, count: int) -> list[Needle]:
        """A number under a name, from near the beginning of the text to near its end."""
        return [self._needle(tokens, (i + 0.5) / count, random.Random(i)) for i in range(count)]

    def _needle(self, tokens: int, depth: float, rng: random.Random) -> Needle:
        name, value = rng.choice(NAMES), str(rng.randint(100_000, 999_999))
        hidden = Placed(depth, f"The special magic number for {name} is {value}.")
        text = (
            f"{self._beginning()}Special magic numbers are hidden in the text below.\n\n"
            f"{place(self._filler().take(self._words(tokens) - 60), [hidden])}\n\n"
            f"Question: What is the special magic number for {name} mentioned in the text above?\n"
            f"Answer: The special magic number for {name} mentioned in the text above is"
        )
        return Needle({"text": text}, [value], 16, depth)

    def _words(self, tokens: int) -> int:
        return max(1, round(tokens / self.per_word) - 20)

    def _beginning(self) -> str:
        self._made += 1
        return f"{self._run}-{self._made}. "

    def _filler(self) -> Filler:
        rng = random.Random(f"filler {self._made}")
        try:
            return Filler(sentences("prose", rng))
        except MissingPackageError:
            return Filler(sentences("repeated", rng))
