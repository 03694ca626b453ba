"""A question about one of many passages, as in RULER's question answering (section 3.4).

RULER puts a question of SQuAD among passages of others. Its data must be downloaded, and a model may know the answers
by heart; here each passage states a fact about a town that does not exist, within sentences of the filler.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from claa_sglang.tasks import words
from claa_sglang.tasks.draft import Draft
from claa_sglang.tasks.filler import Filler

WORDS_PER_PASSAGE = 60  # the fact included

_ENDINGS = "burg by dale ford ham holm mouth stead ton wick".split()
_FIRST = "Ada Boris Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Leon Mara Nils Olga Pavel Rosa Stefan".split()
_LAST = "Adler Bergman Castell Dorn Ebert Falk Grau Hartog Ibsen Janssen Kovac Lindt Moreau Novak Orlov Petit".split()

# What can be known about a town: how a sentence says it, the question, and the kind of the answer. Passages of the same
# kind are what makes the task hard, so there are several kinds.
_KINDS = (
    ("The founder of {} was", "Who founded {}?", "person"),
    ("The mayor of {} is called", "Who is the mayor of {}?", "person"),
    ("The best known painter of {} was", "Which painter lived in {}?", "person"),
    ("The town of {} was first mentioned in the year", "When was {} first mentioned?", "year"),
    ("The bridge at {} was built in the year", "When was the bridge at {} built?", "year"),
    ("A great fire destroyed {} in the year", "When did {} burn down?", "year"),
    ("The number of people who live in {} is", "How many inhabitants has {}?", "number"),
    ("The oldest inn of {} is called", "Which inn is the oldest in {}?", "name"),
    ("The newspaper of {} is called", "Which newspaper is printed in {}?", "name"),
    ("The football club of {} is called", "Which football club plays in {}?", "name"),
)


class Fact(NamedTuple):
    """Something about a town. beginning: of the sentence that says it; answer: the rest of it."""

    town: str
    beginning: str
    question: str
    answer: str

    @property
    def sentence(self) -> str:
        return f"{self.beginning} {self.answer}."


def passages(rng: random.Random, filler: Filler) -> Draft:
    """Numbered passages of WORDS_PER_PASSAGE words, and a question about one at a random depth.

    The size counts facts as well as filler: one passage more must not make a step in the length.
    """
    asked = next(_facts(rng))
    depth, others = rng.random(), _facts(rng, avoid=asked)
    known: list[Fact] = []

    def render(size: int) -> str:
        count = max(1, round(size / WORDS_PER_PASSAGE))
        while len(known) < count - 1:
            known.append(next(others))
        facts = known[: count - 1]
        facts.insert(round(depth * len(facts)), asked)
        text = _fill(facts, filler.take(size - sum(len(fact.sentence.split()) for fact in facts)))
        return f"Answer the question from the passages below.\n\n{text}\n\nQuestion: {asked.question}"

    return Draft(render=render, answers=[asked.answer], answer_prefix=asked.beginning, needles=[asked.sentence])


def _fill(facts: list[Fact], filler: list[str]) -> str:
    """A passage per fact: its share of the sentences, with the fact in their middle."""
    shown = []
    for i, fact in enumerate(facts):
        mine = filler[i * len(filler) // len(facts) : (i + 1) * len(filler) // len(facts)]
        middle = len(mine) // 2
        shown.append(f"Passage {i + 1}: {' '.join([*mine[:middle], fact.sentence, *mine[middle:]])}")
    return "\n\n".join(shown)


def _facts(rng: random.Random, avoid: Fact | None = None) -> Iterator[Fact]:
    """Facts without end, each about another town; none about the town of `avoid`, and none with its answer."""
    taken = {avoid.town} if avoid else set()
    while True:
        town = words.words(rng, 1)[0].capitalize() + rng.choice(_ENDINGS)
        beginning, question, kind = rng.choice(_KINDS)
        fact = Fact(town, beginning.format(town), question.format(town), _answer(rng, kind))
        if town not in taken and not (avoid and fact.answer == avoid.answer):
            taken.add(town)
            yield fact


def _answer(rng: random.Random, kind: str) -> str:
    match kind:
        case "person":
            return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"
        case "year":
            return str(rng.randint(1100, 1899))
        case "number":
            return str(rng.randint(10_000, 99_999))
        case _:
            return words.names(rng, 1)[0].replace("-", " ").title()
