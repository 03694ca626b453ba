"""What was finished: which prompts begin with it, and in what share of cases it was finished before it was used again.

Host-side: no torch, no SGLang.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from claa_sglang.policy.prefix_uses import BLOCK, chain

FORGET = 0.9  # weight of a use after one more use: the last ten decide
CAPACITY = 100_000  # blocks remembered, the least recently used go first: thirteen million tokens


class Finished:
    """Prefixes that were made dense, in whole blocks of 128 tokens, and how often that came in time."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self._capacity = capacity
        self._in_time, self._uses = 0.0, 1.0  # before anything is known, none: a server without pauses is as without us

    def add(self, tokens: Sequence[int], key: str) -> None:
        """All of `tokens` is dense in the prefix cache. key: of those who share it."""
        for digest in chain(tokens, key):
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def length(self, tokens: Sequence[int], key: str) -> int:
        """How many of the first tokens were finished: whole blocks. Who asks uses them."""
        blocks = 0
        if self._blocks:
            for digest in chain(tokens, key):
                if digest not in self._blocks:
                    break
                self._blocks.move_to_end(digest)
                blocks += 1
        return blocks * BLOCK

    def note(self, in_time: bool) -> None:
        """A prefix that a pruned request left is used again. in_time: whether it was finished by then."""
        self._in_time = FORGET * self._in_time + in_time
        self._uses = FORGET * self._uses + 1

    @property
    def share(self) -> float:
        """Of the latest uses, those whose prefix was finished before: 0 to 1."""
        return self._in_time / self._uses

    def clear(self) -> None:
        """The prefix cache was emptied. What was learned of the share stays."""
        self._blocks.clear()
