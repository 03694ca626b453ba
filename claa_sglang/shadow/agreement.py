"""In which tokens of a pruned answer the dense model agrees, from the log probabilities of one dense prefill over it.

A greedy dense answer is the pruned one exactly if each token of it is the dense model's most likely one after the
tokens before it. Where the first one is not, the two answers part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Agreement(NamedTuple):
    """Of one answer: tokens that were compared, those of them that agree, those before the first that does not.

    logprob: the sum of the tokens' log probabilities by the dense model, in nats.
    """

    tokens: int
    agreeing: int
    before_difference: int
    logprob: float

    @property
    def same(self) -> bool:
        """Whether every token agrees."""
        return self.agreeing == self.tokens

    def plus(self, other: Agreement) -> Agreement:
        """The sums of both."""
        return Agreement(
            self.tokens + other.tokens,
            self.agreeing + other.agreeing,
            self.before_difference + other.before_difference,
            self.logprob + other.logprob,
        )


def agreement(answer: Sequence[int], own: Sequence[Sequence[Any]], top: Sequence[Sequence[Sequence[Any]]]) -> Agreement:
    """Hold an answer against the dense model.

    Two tokens that are equally likely are both the most likely one: which of them is chosen is left to a kernel.

    Args:
        answer: token ids, at least one.
        own: (log probability, token id, ...) of each token of the answer. SGLang 0.5.23 writes id 0 for the last one of
            its vocabulary, with that one's log probability.
        top: for each, the most likely tokens as the same tuples, the likeliest first; the first one counts.

    Raises ValueError where the lists are not those of this answer, or a number is not finite.
    """
    if not answer or len(own) != len(answer) or len(top) != len(answer):
        raise ValueError(f"{len(own)} and {len(top)} log probabilities for an answer of {len(answer)} tokens")
    agrees, logprob = [], 0.0
    for token, (value, found, *_), best in zip(answer, own, top, strict=True):
        if found not in (token, 0) or not best or not math.isfinite(value) or not math.isfinite(best[0][0]):
            raise ValueError(f"the log probability of token {token} is missing or not finite")
        agrees.append(token == best[0][1] or value >= best[0][0])
        logprob += value
    before = agrees.index(False) if False in agrees else len(agrees)
    return Agreement(len(agrees), sum(agrees), before, logprob)
