"""Retrieval: special magic numbers, words or UUIDs hidden in a text (RULER's NIAH, arXiv 2404.06654, section 3.1)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from claa_sglang.tasks import words
from claa_sglang.tasks.draft import Draft, listing
from claa_sglang.tasks.filler import Filler, Placed, place
from claa_sglang.tasks.record import Followup


def needles(
    rng: random.Random, filler: Filler, *, kind: str = "number", keys: int = 1, values: int = 1, queries: int = 1
) -> Draft:
    """Values under names, each in a sentence of its own at a random depth; the first `queries` names are asked about.

    kind: of the values, one of words.KINDS. keys: names in the text. values: under each name. queries: names asked
    about. The other names are the follow-up questions, as many at a time.
    """
    names = words.names(rng, keys)
    drawn = words.values(rng, keys * values, kind)
    hidden = [(names[i % keys], value) for i, value in enumerate(drawn)]
    placed = [Placed(rng.random(), _sentence(kind, name, value)) for name, value in hidden]
    many = values * queries > 1
    verb = "are" if many else "is"

    def ask(asked: Sequence[str]) -> Followup:
        thing = f"special magic {kind}{'s' if many else ''} for {listing(asked)}"
        return Followup(
            question=f"What {verb} {'all ' if many else ''}the {thing} mentioned in the text above?",
            answers=[value for name in asked for key, value in hidden if key == name],
            answer_prefix=f"The {thing} mentioned in the text above {verb}",
            needles=[_sentence(kind, name, value) for name, value in hidden if name in asked],
        )

    first, *others = (ask(names[i : i + queries]) for i in range(0, keys, queries))

    def render(size: int) -> str:
        return (
            f"Some special magic {kind}s are hidden in the text below. Memorize them, I will ask about them afterwards."
            f"\n\n{place(filler.take(size), placed)}\n\n"
            f"{first.question}"
        )

    return Draft(
        render=render,
        answers=first.answers,
        answer_prefix=first.answer_prefix,
        needles=[one.sentence for one in sorted(placed)],
        followups=others,
    )


def _sentence(kind: str, name: str, value: str) -> str:
    return f"One of the special magic {kind}s for {name} is: {value}."
