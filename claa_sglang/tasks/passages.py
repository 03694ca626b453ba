"""A question about one of many passages that are alike, as in RULER's question answering (section 3.4).

RULER puts a question of SQuAD among passages of others. Its data must be downloaded, and a model may know the answers
by heart; here each passage states facts about a town that does not exist, within sentences of the filler.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from claa_sglang.tasks import words
from claa_sglang.tasks.draft import Draft
from claa_sglang.tasks.filler import Filler

WORDS_PER_PASSAGE = 60  # about 20 of them facts

_SYLLABLES = "bar bel cor dal den fen gal hol kel lan mar mir nor pel ras sel tam tor val wen".split()
_ENDINGS = "burg by dale ford ham holm mouth stead ton wick".split()
_FIRST = "Ada Boris Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Leon Mara Nils Olga Pavel Rosa Stefan".split()
_LAST = "Adler Bergman Castell Dorn Ebert Falk Grau Hartog Ibsen Janssen Kovac Lindt Moreau Novak Orlov Petit".split()


class Town(NamedTuple):
    """A town and what its passage says about it."""

    name: str
    founder: str
    year: str
    product: str

    def facts(self) -> list[str]:
        return [
            f"The town of {self.name} was founded in {self.year} by {self.founder}.",
            f"{self.name} is known for its {self.product}.",
        ]


# A question about a town, how the answer begins, and the answer.
_QUESTIONS: tuple[Callable[[Town], tuple[str, str, str]], ...] = (
    lambda t: (f"Who was the founder of {t.name}?", f"The founder of {t.name} was", t.founder),
    lambda t: (f"In which year was {t.name} founded?", f"{t.name} was founded in the year", t.year),
    lambda t: (f"What is {t.name} famous for?", f"{t.name} is famous for its", t.product),
)


def passages(rng: random.Random, filler: Filler) -> Draft:
    """Numbered passages of WORDS_PER_PASSAGE words, and a question about one at a random depth.

    The size counts facts as well as filler: one passage more must not make a step in the length.
    """
    asked = next(_towns(rng))
    question, prefix, answer = rng.choice(_QUESTIONS)(asked)
    depth, others = rng.random(), _towns(rng, avoid=asked)
    known: list[Town] = []

    def render(size: int) -> str:
        count = max(1, round(size / WORDS_PER_PASSAGE))
        while len(known) < count - 1:
            known.append(next(others))
        towns = known[: count - 1]
        towns.insert(round(depth * len(towns)), asked)
        text = _fill(towns, filler.take(size - sum(len(fact.split()) for town in towns for fact in town.facts())))
        return f"Answer the question from the passages below.\n\n{text}\n\nQuestion: {question}"

    return Draft(render=render, answers=[answer], answer_prefix=prefix, needles=asked.facts())


def _fill(towns: list[Town], filler: list[str]) -> str:
    """Passages of these towns: each has its share of the sentences and its facts among them."""
    shown = []
    for i, town in enumerate(towns):
        mine = filler[i * len(filler) // len(towns) : (i + 1) * len(filler) // len(towns)]
        middle = len(mine) // 2
        shown.append(f"Passage {i + 1}: {' '.join([*mine[:middle], *town.facts(), *mine[middle:]])}")
    return "\n\n".join(shown)


def _towns(rng: random.Random, avoid: Town | None = None) -> Iterator[Town]:
    """Towns without end; nothing that `avoid` is known for is true of them, so that only its own passage answers."""
    taken = {avoid.name} if avoid else set()
    while True:
        name = "".join(rng.choices(_SYLLABLES, k=2)).capitalize() + rng.choice(_ENDINGS)
        founder = f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"
        (product,) = words.names(rng, 1)
        town = Town(name, founder, str(rng.randint(1100, 1899)), f"{product.replace('-', ' ')} festival")
        if name not in taken and not (avoid and set(town) & set(avoid)):
            taken.add(name)
            yield town
