"""A prompt of a given length in tokens."""

from __future__ import annotations

from collections.abc import Callable

LEAST_SHARE = 0.97  # of the length asked for
_TRIES = 40


class FitError(ValueError):
    """A task cannot be made this short; the message says how long it is at least."""


def fit(count_tokens: Callable[[int], int], length: int) -> int:
    """The size at which `count_tokens(size)` is at most `length` and at least LEAST_SHARE of it.

    Token counts are nearly proportional to the size, so each guess lies on the line through the two sizes that
    enclose the target; three or four counts are enough. Raises FitError if even an empty text is too long.
    """
    low, low_tokens = 0, count_tokens(0)
    if low_tokens > length:
        raise FitError(f"{length} tokens are too few: without any filler the prompt has {low_tokens}")
    high, high_tokens = length, count_tokens(length)
    while high_tokens <= length:  # a tokenizer with less than a token per word
        low, low_tokens = high, high_tokens
        high, high_tokens = 2 * high, count_tokens(2 * high)
    target = (1 + LEAST_SHARE) / 2 * length
    for _ in range(_TRIES):
        if low_tokens >= LEAST_SHARE * length:
            return low
        guess = low + round((high - low) * (target - low_tokens) / (high_tokens - low_tokens))
        guess = min(max(guess, low + 1), high - 1)
        tokens = count_tokens(guess)
        if tokens > length:
            high, high_tokens = guess, tokens
        else:
            low, low_tokens = guess, tokens
        if high - low < 2:
            break
    if low_tokens >= LEAST_SHARE * length:
        return low
    raise FitError(f"no text of {length} tokens: {low_tokens} with {low} words, {high_tokens} with {high}")
