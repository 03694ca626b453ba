"""Texts with a needle in them: a six-digit number under a name, hidden in ordinary prose or in repeated sentences.

The prose is tests/prose.txt, written for this project: 34 passages on unrelated subjects, 272 sentences, none twice,
about 3,800 tokens. The two kinds of text stay apart on purpose: scored layers chosen on one kind often fail on the
other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

PASSAGES: tuple[tuple[str, ...], ...] = tuple(
    tuple(f"{sentence.rstrip('.')}." for sentence in passage.split(". "))
    for passage in Path(__file__).with_name("prose.txt").read_text().strip().split("\n\n")
)
# What many needle tests use. The ranking has an easy time with it: only the needle differs from its surroundings.
REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.".split(". ")
TOKENS_PER_SENTENCE = 14  # of the prose, with SmolLM2's tokenizer
NAMES = tuple("apple river stone candle violin harbor meadow tiger planet copper silver garden".split())


def prose(sentences: int, seed: int) -> list[str]:
    """So many sentences of prose: whole passages in an order that `seed` decides, so none twice up to 272."""
    passages = list(PASSAGES)
    random.Random(seed).shuffle(passages)
    text = [sentence for passage in passages for sentence in passage]
    if sentences > len(text):
        raise ValueError(f"{sentences} sentences asked for, the prose has {len(text)}")
    return text[:sentences]


def repeated(sentences: int) -> list[str]:
    """So many sentences, of five that repeat (about 5 tokens each)."""
    return [f"{REPEATED[i % len(REPEATED)].rstrip('.')}." for i in range(sentences)]


def needle(name: str, value: int) -> str:
    return f"The special magic number for {name} is {value}."


def hide(text: list[str], needles: Mapping[str, int], depths: list[float]) -> str:
    """`text` with the i-th needle at the share `depths[i]` (0 to 1) of its sentences, as one string."""
    places = [(round(depth * len(text)), needle(*item)) for depth, item in zip(depths, needles.items(), strict=True)]
    result = list(text)
    for place, sentence in sorted(places, reverse=True):
        result.insert(place, sentence)
    return " ".join(result)


def question(name: str) -> str:
    return f"What is the special magic number for {name} mentioned in the provided text?"


def messages(text: str, *names: str, answers: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """A chat about `text`: a question per name, and the answers of all questions but the last."""
    first = f"Memorize the special magic numbers hidden in this text.\n{text}\n{question(names[0])}"
    chat = [{"role": "user", "content": first}]
    for name, answer in zip(names[1:], answers, strict=True):
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": question(name)}]
    return chat
