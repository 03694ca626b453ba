"""The scenarios by name: which engines each takes, at which prompt lengths, and what one round of it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.ttft import pauses, scenarios
from benchmarks.ttft.scenarios import Lab, Samples
from benchmarks.ttft.settings import Settings


class Scenario(NamedTuple):
    """engines: names of those it takes. points: prompt lengths. round: what is done once at one of them.

    pauses: whether it waits for what a server does while it is idle; it runs where it is named alone, as it takes long.
    long: whether a round takes a minute or so: it has `long_rounds`, and none to warm up.
    """

    engines: tuple[str, ...]
    points: Callable[[Settings], list[int]]
    round: Callable[[Lab, int], Samples]
    pauses: bool = False
    long: bool = False


def decode_lengths(settings: Settings) -> list[int]:
    """Those of which a batch has room."""
    return [tokens for tokens in settings.decode_lengths if settings.batches(tokens)]


# In the order in which they run: what matters most comes first, where a run may be cut short.
SCENARIOS: dict[str, Scenario] = {
    "cold": Scenario(("stock", "claa", "early", "late", "one"), lambda s: s.lengths, scenarios.cold),
    "dense": Scenario(("stock", "claa"), lambda s: s.dense_lengths, scenarios.dense),
    "second-turn": Scenario(("stock", "claa", "late", "one"), lambda s: s.prefix_lengths, scenarios.second_turn),
    "shared-prefix": Scenario(("stock", "claa"), lambda s: s.prefix_lengths, scenarios.shared_prefix),
    "burst": Scenario(("stock", "claa"), lambda s: s.burst_lengths, scenarios.burst),
    "mixed": Scenario(("stock", "claa"), lambda s: s.mixed_lengths, scenarios.mixed),
    "growing-chat": Scenario(("stock", "claa"), lambda s: [s.chat.last], scenarios.growing_chat),
    "decode": Scenario(("stock", "claa"), decode_lengths, scenarios.decode),
    "after-pause": Scenario(("stock", "claa"), lambda s: s.pause_lengths, pauses.after_pause, True),
    "arrivals": Scenario(("claa",), lambda s: [s.rate_tokens], pauses.arrivals, True, True),
    "pasting-chat": Scenario(("stock", "claa"), lambda s: [s.chat.last], pauses.pasting_chat, True, True),
    "users": Scenario(("stock", "claa"), lambda s: s.users_lengths, pauses.users, True, True),
    "thinking-chat": Scenario(("stock", "claa"), lambda s: [s.chat.last], pauses.thinking_chat, True, True),
}
