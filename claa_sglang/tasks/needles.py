"""Retrieval: special magic numbers, words or UUIDs hidden in a text (RULER's NIAH, arXiv 2404.06654, section 3.1)."""

from __future__ import annotations

import random

from claa_sglang.tasks import words
from claa_sglang.tasks.draft import Draft, listing
from claa_sglang.tasks.filler import Filler, Placed, place


def needles(
    rng: random.Random, filler: Filler, *, kind: str = "number", keys: int = 1, values: int = 1, queries: int = 1
) -> Draft:
    """Values under names, each in a sentence of its own at a random depth; the first `queries` names are asked about.

    kind: of the values, one of words.KINDS. keys: names in the text. values: under each name. queries: names asked
    about.
    """
    names = words.names(rng, keys)
    drawn = words.values(rng, keys * values, kind)
    hidden = [(names[i % keys], value) for i, value in enumerate(drawn)]
    placed = [Placed(rng.random(), f"One of the special magic {kind}s for {name} is: {v}.") for name, v in hidden]
    asked = names[:queries]
    many = values * queries > 1
    thing = f"special magic {kind}{'s' if many else ''} for {listing(asked)}"
    verb = "are" if many else "is"

    def render(size: int) -> str:
        return (
            f"Some special magic {kind}s are hidden in the text below. Memorize them, I will ask about them afterwards."
            f"\n\n{place(filler.take(size), placed)}\n\n"
            f"What {verb} {'all ' if many else ''}the {thing} mentioned in the text above?"
        )

    return Draft(
        render=render,
        answers=[value for name in asked for key, value in hidden if key == name],
        answer_prefix=f"The {thing} mentioned in the text above {verb}",
        needles=[one.sentence for one in sorted(placed)],
    )
