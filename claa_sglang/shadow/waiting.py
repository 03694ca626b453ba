"""Pruned answers that wait to be held against dense ones: few, and few tokens; the newest win."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_WAITING = 16
MAX_TOKENS = 1 << 18  # of all together: 2 MiB of token ids
# Tokens of an answer that are compared, from the first. Each is a row of the vocabulary in the server's memory, as a
# request is in a step of decoding.
ANSWER_TOKENS = 256


@dataclass(eq=False)
class Shadow:
    """One pruned request that was drawn.

    prompt: its token ids. answer: those of its answer, empty until it ended, at most ANSWER_TOKENS. sampled: whether
    its tokens were drawn at random, not the likeliest. labels: SGLang's of its metrics. keys: `extra_key` and
    `cache_salt` of the request, which decide whose cached prefixes it may use. weights: how often weights had been
    updated when it came. tries: how often it was asked.
    """

    prompt: Sequence[int] = field(repr=False)
    sampled: bool
    labels: Mapping[str, str]
    keys: tuple[str | None, str | None]
    weights: int
    answer: Sequence[int] = field(default=(), repr=False)
    tries: int = 0

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.answer)


class Waiting:
    """A queue, bounded in requests and in tokens."""

    def __init__(self, max_waiting: int = MAX_WAITING, max_tokens: int = MAX_TOKENS) -> None:
        self._max_waiting, self._max_tokens = max_waiting, max_tokens
        self._queue: deque[Shadow] = deque()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, shadow: Shadow) -> list[Shadow]:
        """Put it last. Returns what has to go for it, the oldest first; itself where it is too large alone."""
        if shadow.tokens > self._max_tokens:
            return [shadow]
        gone = []
        while not self._fits(shadow):
            gone.append(self.take())
        self._queue.append(shadow)
        self.tokens += shadow.tokens
        return gone

    def put_back(self, shadow: Shadow) -> bool:
        """Put it first, if nothing has to go for it; whether it was."""
        if not self._fits(shadow):
            return False
        self._queue.appendleft(shadow)
        self.tokens += shadow.tokens
        return True

    def take(self) -> Shadow:
        """The oldest one. Raises IndexError if none waits."""
        shadow = self._queue.popleft()
        self.tokens -= shadow.tokens
        return shadow

    def clear(self) -> list[Shadow]:
        """Let all go, and return them."""
        gone = list(self._queue)
        self._queue.clear()
        self.tokens = 0
        return gone

    def _fits(self, shadow: Shadow) -> bool:
        return len(self._queue) < self._max_waiting and self.tokens + shadow.tokens <= self._max_tokens
