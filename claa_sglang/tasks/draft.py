"""What a task makes: a question about a text whose length is still open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from claa_sglang.tasks.record import Followup


class Draft(NamedTuple):
    """A user's message with answers. Everything random in it is decided; only its length is not.

    render: the message with so many words of filler (list items, where a task has a list instead of a text); longer for
        more, nearly in proportion. The other fields are those of `record.Prompt`.
    """

    render: Callable[[int], str]
    answers: list[str]
    answer_prefix: str
    needles: list[str]
    exact: bool = False
    followups: Sequence[Followup] = ()


def listing(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
