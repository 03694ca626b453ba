"""Whether an answer is right."""

from __future__ import annotations

from collections.abc import Sequence


def grade(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that the answer contains, whatever their case: 0 to 1.

    RULER's metric (`string_match_all`, arXiv 2404.06654, section 4). Raises ValueError if nothing is expected.
    """
    if not expected:
        raise ValueError("nothing to grade against: the prompt has no answers")
    said = answer.casefold()
    return sum(one.casefold() in said for one in expected) / len(expected)
