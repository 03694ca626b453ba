"""What a choice must keep, and for which prompt it is priced. No torch here: the command line reads its defaults."""

from __future__ import annotations

from typing import NamedTuple

PROMPT_TOKENS = 32768  # of the prompt whose time to first token is predicted, in a model that takes so many
LONG_ANSWER = 24  # tokens of one needle, from which an answer counts as copied at length
LONG_TASKS = ("needle-uuid", "copy-code", "copy-quote", "copy-links")  # whose answers are that long


class CalibrationError(ValueError):
    """Nothing can be chosen, or should be; the text says why and what to do."""


class Target(NamedTuple):
    """What must be reached over the prompts.

    mass: mean share of the oracle's mass, relative to what the oracle itself keeps at `reference_rate`. The budget of
        the comparison is fixed: against the oracle at the choice's own budget every choice would do that keeps next to
        nothing, as the oracle then keeps next to nothing either.
        Below 1 by more than chance needs: what keeps answers whole spends its budget on their ends, at which the oracle
        looks less. It stands for what no known answer needs.
    recall: mean share of answer tokens kept, where they are known. Mass alone can hide a lost answer: much of it lies
        on tokens that every ranking keeps, such as the first.
    whole: share of prompts of which every answer token is kept. A mean share can hide lost answers too: of an answer of
        30 tokens that lacks one, 0.97 is kept, and it is wrong.
    """

    mass: float = 0.8
    recall: float = 0.95
    whole: float = 0.95
    reference_rate: float = 0.2
