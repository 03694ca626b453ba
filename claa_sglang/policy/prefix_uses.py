"""How often the beginning of a prompt has been used: by turns of a conversation, or by questions over one document."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

BLOCK = 512  # tokens; uses are counted for whole blocks from the start
CAPACITY = 100_000  # blocks remembered, the least recently used go first: fifty million tokens


class PrefixUses:
    """Counts, in blocks, how many prompts began with the same tokens. Counts are forgotten in order of last use."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._uses: OrderedDict[bytes, int] = OrderedDict()
        self._capacity = capacity

    def note(self, tokens: Sequence[int], key: str, shared: int) -> float:
        """Count a prompt, and say how many before it had its first `shared` tokens, on average over these.

        Of a conversation, the newest tokens were in one prompt before and the oldest in all. key: the client's own,
        whose requests share nothing with others. Whole blocks are compared; below one, 0.
        """
        digest, before = key.encode("utf-8", "surrogatepass"), []
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            block = array("q", tokens[end - BLOCK : end]).tobytes()
            digest = blake2b(block, digest_size=16, key=blake2b(digest, digest_size=16).digest()).digest()
            uses = self._uses.pop(digest, 0)
            if end <= shared:
                before.append(uses)
            self._uses[digest] = uses + 1
        while len(self._uses) > self._capacity:
            self._uses.popitem(last=False)
        return sum(before) / len(before) if before else 0.0
