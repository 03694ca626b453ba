"""How often the beginning of a prompt has been used: by turns of a conversation, or by questions over one document."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

BLOCK = 128  # tokens; uses are counted for whole blocks from the start
CAPACITY = 100_000  # blocks remembered, the least recently used go first: thirteen million tokens


class Uses(NamedTuple):
    """What is known of a prompt's cached beginning.

    before: how many prompts before had it, on average over its tokens.
    continued: whether the prompt goes on where a whole prompt before it ended, as the next turn of a conversation does;
        the same prompt again, or another question over the same text, does not.
    """

    before: float
    continued: bool = False


class _Block(NamedTuple):
    """uses: prompts that had the block; step: that of the last. end: (tokens, digest) by which the last prompt that
    was answered went on after its last whole block, which is this one; None before there is one."""

    uses: int = 0
    step: int = -1
    end: tuple[int, bytes] | None = None


class PrefixUses:
    """Counts, in blocks, how many prompts began with the same tokens. Counts are forgotten in order of last use."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self._capacity = capacity

    def note(self, tokens: Sequence[int], key: str, shared: int, step: int, answered: bool = True) -> Uses:
        """Count a prompt, and say what is known of its first `shared` tokens.

        Of a conversation, the newest tokens were in one prompt before and the oldest in all. key: the client's own,
        whose requests share nothing with others. step: prompts of one scheduling step are one use of what they share:
        they are there at once, and say nothing of how often it will be used. answered: whether anything is generated;
        a prompt that was sent to be cached is no turn. Whole blocks are compared; below one, nothing is known.
        """
        before, continued = [], False
        whole = len(tokens) // BLOCK * BLOCK
        for end, digest in zip(range(BLOCK, whole + 1, BLOCK), chain(tokens, key), strict=True):
            block = self._blocks.pop(digest, _Block())
            if block.step != step:
                block = block._replace(uses=block.uses + 1, step=step)
            if end <= shared:
                before.append(block.uses - 1)
            if block.end is not None:
                count, rest = block.end
                stop = end + count
                continued |= stop <= shared and rest == _digest(tokens[end:stop], after=digest)
            if end == whole and answered:
                block = block._replace(end=(len(tokens) - end, _digest(tokens[end:], after=digest)))
            self._blocks[digest] = block
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return Uses(sum(before) / len(before) if before else 0.0, continued)


def chain(tokens: Sequence[int], key: str) -> Iterator[bytes]:
    """A digest for each whole block from the start, of everything up to its end. key: of those who share."""
    # Of a prompt of 32,768 tokens this is a millisecond of its TTFT: one pass over its bytes.
    whole = memoryview(_bytes(tokens[: len(tokens) // BLOCK * BLOCK]))
    running, size = _hash(key.encode("utf-8", "surrogatepass")), BLOCK * array("q").itemsize
    for start in range(0, len(whole), size):
        running.update(whole[start : start + size])
        yield running.copy().digest()


def _digest(tokens: Sequence[int], after: bytes) -> bytes:
    """Of tokens that follow what `after` stands for."""
    running = _hash(after)
    running.update(_bytes(tokens))
    return running.digest()


def _hash(after: bytes) -> blake2b:
    return blake2b(digest_size=16, key=blake2b(after, digest_size=16).digest())


def _bytes(tokens: Sequence[int]) -> bytes:
    return (tokens if isinstance(tokens, array) and tokens.typecode == "q" else array("q", tokens)).tobytes()
