"""Whether an answer is right."""

from __future__ import annotations

import re
from collections.abc import Sequence


def grade(answer: str, expected: Sequence[str], exact: bool = False) -> float:
    """Share of the expected strings that the answer contains: 0 to 1.

    exact: False: whatever their case and whatever is around them, RULER's metric (`string_match_all`, arXiv 2404.06654,
    section 4). True: character by character, and not as a part of a longer word or number: "x = 1" is not in "x = 12".
    Raises ValueError if nothing is expected.
    """
    if not expected:
        raise ValueError("nothing to grade against: the prompt has no answers")
    if exact:
        return sum(bool(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", answer)) for one in expected) / len(expected)
    said = answer.casefold()
    return sum(one.casefold() in said for one in expected) / len(expected)
