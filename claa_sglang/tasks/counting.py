"""Aggregation: which words are the most common in a list (RULER's common words extraction, section 3.3)."""

from __future__ import annotations

import random

from claa_sglang.tasks import words
from claa_sglang.tasks.draft import Draft
from claa_sglang.tasks.filler import Filler

COMMON = 10  # words asked for
RATIO = 10  # a common word is so many times as frequent as another, as in RULER
EXAMPLE_TIMES = 4


def common_words(rng: random.Random, filler: Filler) -> Draft:
    """A numbered list; half of its items are COMMON words, the others are RATIO times as rare (at least one each).

    Has no filler: the size is that of the list. A worked example over a shorter list comes first, as in RULER.
    """
    vocabulary = words.words(rng, 5000)
    common, example, rare = vocabulary[:COMMON], vocabulary[COMMON : 2 * COMMON], vocabulary[2 * COMMON :]
    example_list = _list(example, EXAMPLE_TIMES, rare[-COMMON:], 1, rng.random())
    order = rng.random()

    def render(size: int) -> str:
        times = max(2, size // (2 * COMMON))
        rarely = max(1, times // RATIO)
        others = rare[: max(1, (size - COMMON * times) // rarely)]
        return f"{_task(example_list)}\n{PREFIX} {' '.join(_numbered(example))}\n\n" + _task(
            _list(common, times, others, rarely, order)
        )

    return Draft(render=render, answers=common, answer_prefix=PREFIX, needles=[])


PREFIX = f"Answer: the {COMMON} words that appear most often in the list are:"


def _list(often: list[str], times: int, seldom: list[str], rarely: int, seed: float) -> str:
    items = often * times + seldom * rarely
    random.Random(seed).shuffle(items)
    return " ".join(_numbered(items))


def _numbered(items: list[str]) -> list[str]:
    return [f"{number}. {item}" for number, item in enumerate(items, 1)]


def _task(text: str) -> str:
    return (
        "Below is a numbered list of words. Some of them appear more often than others. Memorize those that appear "
        f"most often.\n{text}\nQuestion: what are the {COMMON} most common words in the list above?"
    )
