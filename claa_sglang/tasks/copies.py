"""Copying at length: what is asked for must be said again word by word, as code, quotations and links are.

A needle's answer is a few tokens. Here it is about a hundred, and a ranking that keeps only where an answer begins
fails. An answer is graded by the share of its lines, sentences or links that it has exactly (`grade`).

An answer prefix ends where tokenizers part words: after a word, a dash or a quotation mark, and never after a line
break, which some tokenizers join with the spaces that follow it. So the first token is the one that stands in the text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from claa_sglang.tasks import words
from claa_sglang.tasks.draft import Draft
from claa_sglang.tasks.filler import Filler, Placed, place
from claa_sglang.tasks.record import Followup

CODE_LINES = 8  # of a function, after its first line
SENTENCES = 4  # of a quotation
LINKS = 5  # of a list
OTHERS = 3  # functions, quotations or lists that are not asked for

_OPERATORS = "+-*%&|^"
_SITES = "org net io dev com info".split()


def copy_code(rng: random.Random, filler: Filler) -> Draft:
    """Functions hidden in the text; one of them is to be written again, from its first line and the first name in it.

    Answers: its lines, without their indentation; the first begins behind the name that the answer prefix ends with.
    """
    functions = {name: _function(rng, name) for name in _identifiers(rng, 1 + OTHERS)}
    placed = [Placed(rng.random(), "\n\n" + "\n".join(one) + "\n\n") for one in functions.values()]

    def ask(asked: str, first: str, *body: str) -> Followup:
        name, rest = body[0].strip().split(" ", 1)
        return Followup(
            question=f"Write down the function {asked} exactly as it stands in the text above.",
            answers=[rest, *(line.strip() for line in body[1:])],
            answer_prefix=f"```python\n{first}\n    {name}",
            needles=["\n".join(body)],
        )

    return _draft(filler, placed, "Python functions", [ask(name, *lines) for name, lines in functions.items()])


def copy_quote(rng: random.Random, filler: Filler) -> Draft:
    """Statements of several people hidden in the text; one of them is to be quoted whole. Answers: its sentences."""
    people = [name.replace("-", " ").title() for name in words.names(rng, 1 + OTHERS)]
    statements = {who: [_sentence(rng) for _ in range(SENTENCES)] for who in people}
    placed = [
        Placed(rng.random(), f'The statement of {who} was: "{" ".join(said)}"') for who, said in statements.items()
    ]

    def ask(who: str, said: list[str]) -> Followup:
        return Followup(
            question=f"What was the statement of {who} in the text above? Quote all of it, word by word.",
            answers=said,
            answer_prefix=f'The statement of {who} was: "',
            needles=[" ".join(said)],
        )

    return _draft(filler, placed, "statements", [ask(who, said) for who, said in statements.items()])


def copy_links(rng: random.Random, filler: Filler) -> Draft:
    """Lists of links hidden in the text; one of them is to be written down whole. Answers: its links."""
    lists = {topic: [_link(rng) for _ in range(LINKS)] for topic in words.names(rng, 1 + OTHERS)}
    placed = [
        Placed(rng.random(), f"\n\nThe sources about {topic} are:\n{_bullets(links)}\n\n")
        for topic, links in lists.items()
    ]

    def ask(topic: str, links: list[str]) -> Followup:
        return Followup(
            question=f"What are the sources about {topic} in the text above? Give the whole list.",
            answers=links,
            answer_prefix=f"The sources about {topic} are:\n-",
            needles=[_bullets(links)],
        )

    return _draft(filler, placed, "lists of sources", [ask(topic, links) for topic, links in lists.items()])


def _draft(filler: Filler, placed: Sequence[Placed], things: str, questions: Sequence[Followup]) -> Draft:
    """The first question about the text, and the others as its follow-ups."""
    first, *others = questions

    def render(size: int) -> str:
        text = place(filler.take(size), placed).strip().replace(" \n\n", "\n\n").replace("\n\n ", "\n\n")
        return (
            f"Some {things} are hidden in the text below. Memorize them, I will ask for one of them afterwards."
            f"\n\n{text}\n\n{first.question}"
        )

    return Draft(render, first.answers, first.answer_prefix, first.needles, exact=True, followups=others)


def _function(rng: random.Random, name: str) -> list[str]:
    """Lines of a function that computes with its arguments and names of its own, no name with two values."""
    drawn = words.words(rng, 3 + CODE_LINES - 1)
    known, variables = drawn[:3], drawn[3:]
    lines = [f"def {name}({', '.join(known)}):"]
    for variable in variables:
        left, right = rng.sample(known, 2)
        one, two = rng.choice(_OPERATORS), rng.choice(_OPERATORS)
        lines.append(f"    {variable} = {left} {one} {right} {two} {rng.randint(2, 999)}")
        known.append(variable)
    return [*lines, f"    return {known[-1]} {rng.choice(_OPERATORS)} {rng.choice(known[:-1])}"]


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
