"""How many prompt tokens each prune step keeps: a host-side function of the prompt length.

Nothing here needs the GPU, so every shape of the late pass is known before layer 0.
"""

from __future__ import annotations

from collections.abc import Iterable


def kept_count(prompt_tokens: int, keep_rate: float, window: int) -> int:
    """Number of prompt tokens that go through the late layers, the window included.

    `max(int(keep_rate * N), min(window, N))`, and never more than N. The authors take `int(r * N) - W` ranked
    tokens and then the W window tokens; this is the same count, and it does not fail when r * N < W.
    It never falls when N or keep_rate grows.
    """
    return min(prompt_tokens, max(int(keep_rate * prompt_tokens), window))


def kept_counts(prompt_tokens: int, keep_rates: Iterable[float], window: int) -> tuple[int, ...]:
    """`kept_count` of each prune step, in step order; falling rates give counts that never rise."""
    return tuple(kept_count(prompt_tokens, rate, window) for rate in keep_rates)
