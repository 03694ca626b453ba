"""From which prompt length on pruning is predicted to be faster."""

from __future__ import annotations

from claa_sglang.plan.predict import Predictor, Prune

STEP = 1.06  # of one length that is looked at to the next


def pays_from(predictor: Predictor, prune: Prune, longest: int) -> int | None:
    """The least length from which on a cold prompt is faster pruned, at every longer one that is looked at.

    None where it is not even at `longest` tokens. Lengths grow by 6 %, so that a step of the last chunk may be missed;
    between the last that is slower and the next, the least is found exactly.
    """

    def pays(tokens: int) -> bool:
        return predictor.pruned(0, tokens, prune) < predictor.dense(0, tokens)

    fast, slow = longest, 0
    if not pays(fast):
        return None
    while fast > 1:
        shorter = min(fast - 1, int(fast / STEP))
        if not pays(shorter):
            slow = shorter
            break
        fast = shorter
    while fast - slow > 1:
        middle = (slow + fast) // 2
        if pays(middle):
            fast = middle
        else:
            slow = middle
    return fast
