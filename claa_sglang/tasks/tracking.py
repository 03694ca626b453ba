"""Multi-hop tracing: variables that pass a value on, hidden in a text (RULER's variable tracking, section 3.2)."""

from __future__ import annotations

import random
import string

from claa_sglang.tasks.draft import Draft
from claa_sglang.tasks.filler import Filler, Placed, place

HOPS = 4  # as in RULER


def tracking(rng: random.Random, filler: Filler) -> Draft:
    """One chain: a variable is given a number, and each of HOPS more is given the one before. Asked for: all of them.

    Assignments are in order, at random depths. A worked example comes first, as in RULER.
    """
    drawn = rng.sample(string.ascii_uppercase, 2 * (HOPS + 1))
    variables = [letter + "".join(rng.choices(string.ascii_uppercase, k=4)) for letter in drawn]
    example, asked = variables[: HOPS + 1], variables[HOPS + 1 :]
    example_value, value = (str(number) for number in rng.sample(range(10_000, 100_000), 2))
    chain = _chain(asked, value)
    placed = [Placed(depth, one) for depth, one in zip(sorted(rng.random() for _ in chain), chain, strict=True)]

    def render(size: int) -> str:
        shown = f"{_task(' '.join(_chain(example, example_value)), example_value)}\n{_prefix(example_value)}"
        return f"{shown} {' '.join(example)}\n\n{_task(place(filler.take(size), placed), value)}"

    return Draft(render=render, answers=asked, answer_prefix=_prefix(value), needles=chain)


def _chain(variables: list[str], value: str) -> list[str]:
    return [f"VAR {variable} = {f'VAR {variables[i - 1]}' if i else value}." for i, variable in enumerate(variables)]


def _task(text: str, value: str) -> str:
    return (
        f"Memorize and follow the chain of variable assignments hidden in the text below.\n\n{text}\n\n"
        f"Question: which variables have the value {value} in the text above?"
    )


def _prefix(value: str) -> str:
    return f"Answer: the {HOPS + 1} variables that have the value {value} are:"
