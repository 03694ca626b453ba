"""Copying at length: what is asked for must be said again word by word, as code, quotations and links are.

A needle's answer is a few tokens. Here it is tens to hundreds, and a ranking that keeps only where an answer begins
fails. An answer is graded by the share of its lines, sentences or links that it has exactly.
"""

from __future__ import annotations

import random

from claa_sglang.tasks import words
from claa_sglang.tasks.draft import Draft
from claa_sglang.tasks.filler import Filler, Placed, place

CODE_LINES = 8  # of a function, after its first line
SENTENCES = 4  # of a quotation
LINKS = 5  # of a list
OTHERS = 3  # functions, quotations or lists that are not asked for

_OPERATORS = "+-*%&|^"
_SITES = "org net io dev com info".split()


def copy_code(rng: random.Random, filler: Filler) -> Draft:
    """Functions hidden in the text; one of them is to be continued as it stands there, from its first line."""
    functions = [_function(rng, name) for name in _identifiers(rng, 1 + OTHERS)]
    asked = functions[0]

    def render(size: int) -> str:
        placed = [Placed(depth, f"\n\n{one}\n\n") for depth, one in zip(depths, functions, strict=True)]
        return (
            "Some Python functions are hidden in the text below. Memorize them, I will ask for one of them afterwards."
            f"\n\n{place(filler.take(size), placed)}\n\n"
            f"Write the function {asked_name} exactly as it is in the text above."
        )

    depths = [rng.random() for _ in functions]
    first, *rest = asked.splitlines()
    asked_name = first.removeprefix("def ").partition("(")[0]
    return Draft(
        render=render,
        answers=[line.strip() for line in rest],
        answer_prefix=f"```python\n{first}\n",
        needles=["\n".join(rest)],
    )


def copy_quote(rng: random.Random, filler: Filler) -> Draft:
    """Statements of several people hidden in the text; one of them is to be quoted whole."""
    people = [name.replace("-", " ").title() for name in words.names(rng, 1 + OTHERS)]
    statements = [[_sentence(rng) for _ in range(SENTENCES)] for _ in people]
    placed = [
        Placed(rng.random(), f"The statement of {who} was: \"{' '.join(said)}\"")
        for who, said in zip(people, statements, strict=True)
    ]

    def render(size: int) -> str:
        return (
            "Some statements are hidden in the text below. Memorize them, I will ask for one of them afterwards."
            f"\n\n{place(filler.take(size), placed)}\n\n"
            f"What was the statement of {people[0]} in the text above? Quote all of it, word by word."
        )

    return Draft(
        render=render,
        answers=statements[0],
        answer_prefix=f'The statement of {people[0]} was: "',
        needles=[" ".join(statements[0])],
    )


def copy_links(rng: random.Random, filler: Filler) -> Draft:
    """Lists of links hidden in the text; one of them is to be written down whole."""
    topics = words.names(rng, 1 + OTHERS)
    lists = [[_link(rng) for _ in range(LINKS)] for _ in topics]
    placed = [
        Placed(rng.random(), f"\n\nThe sources about {topic} are:\n{_bullets(links)}\n\n")
        for topic, links in zip(topics, lists, strict=True)
    ]

    def render(size: int) -> str:
        return (
            "Some lists of sources are hidden in the text below. Memorize them, I will ask for one of them afterwards."
            f"\n\n{place(filler.take(size), placed)}\n\n"
            f"What are the sources about {topics[0]} in the text above? Give every link."
        )

    return Draft(
        render=render,
        answers=lists[0],
        answer_prefix=f"The sources about {topics[0]} are:\n",
        needles=[_bullets(lists[0])],
    )


def _function(rng: random.Random, name: str) -> str:
    arguments = words.words(rng, 3)
    known, lines = list(arguments), [f"def {name}({', '.join(arguments)}):"]
    for variable in words.words(rng, CODE_LINES - 1):
        left, right = rng.choice(known), rng.choice(known)
        lines.append(
            f"    {variable} = {left} {rng.choice(_OPERATORS)} {right} {rng.choice(_OPERATORS)} {rng.randint(2, 999)}"
        )
        known.append(variable)
    return "\n".join([*lines, f"    return {known[-1]} {rng.choice(_OPERATORS)} {rng.choice(known[:-1])}"])


def _identifiers(rng: random.Random, count: int) -> list[str]:
    return [name.replace("-", "_") for name in words.names(rng, count)]


def _sentence(rng: random.Random) -> str:
    (verb,), (adjective, other) = words.words(rng, 1, "verb"), words.words(rng, 2, "adjective")
    subject, thing, where = words.words(rng, 3)
    return f"The {adjective} {subject} will {verb} the {other} {thing} near the {where}."


def _link(rng: random.Random) -> str:
    site, part = words.names(rng, 2)
    return f"https://{site}.{rng.choice(_SITES)}/{part}/{rng.getrandbits(40):010x}"


def _bullets(links: list[str]) -> str:
    return "\n".join(f"- {link}" for link in links)
