"""What a choice must keep, and for which prompt it is priced. No torch here: the command line reads its defaults."""

from __future__ import annotations

from typing import NamedTuple

PROMPT_TOKENS = 32768  # of the prompt whose time to first token is predicted, in a model that takes so many


class CalibrationError(ValueError):
    """Nothing can be chosen, or should be; the text says why and what to do."""


class Target(NamedTuple):
    """What the mean over prompts must reach.

    mass: of the oracle's mass, relative to what the oracle itself keeps at `reference_rate`. The budget of the
        comparison is fixed: against the oracle at the choice's own budget every choice would do that keeps next to
        nothing, as the oracle then keeps next to nothing either.
    recall: of needle tokens, where needles are known. Mass alone can hide a lost needle: much of it lies on tokens that
        every ranking keeps, such as the first.
    """

    mass: float = 0.95
    recall: float = 0.95
    reference_rate: float = 0.2
