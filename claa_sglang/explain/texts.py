"""Texts of single tokens, from a server's /detokenize.

Decoded one by one, tokens can miss two things: a space before them, which some tokenizers give to the first token of a
text alone, and characters of which each token has some bytes. So a token's text is what it adds to the one before it,
and the tokens of one character get it together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from claa_sglang.tools.connection import Connection

BATCH = 4000  # texts of one request
BROKEN = "\ufffd"  # what a decoder gives for bytes that are no character
LONGEST = 8  # tokens that are tried together


class TokenText(NamedTuple):
    """One token.

    text: what it adds to the text. part_of: of a token that has some bytes of a character, the character; "" of others.
    The first token of such a character has it as its text, the others none.
    """

    id: int
    text: str
    part_of: str = ""


def token_texts(server: Connection, ids: Sequence[int]) -> list[TokenText]:
    """The text of each token; together they are the text of all. Raises as `Connection` does."""
    singles = dict(zip(unique := list(dict.fromkeys(ids)), _decode(server, [[i] for i in unique]), strict=True))
    if "".join(singles[i] for i in ids) == _decode(server, [ids])[0]:
        return [TokenText(i, singles[i]) for i in ids]
    pairs = list(dict.fromkeys(zip(ids, ids[1:], strict=False)))
    joined = dict(zip(pairs, _decode(server, [list(pair) for pair in pairs]), strict=True))
    texts = [singles[ids[0]]]
    for before, here in zip(ids, ids[1:], strict=False):
        start, both = singles[before], joined[before, here]
        if BROKEN in singles[here] or not both.startswith(start):
            texts.append(singles[here] if BROKEN in singles[here] else BROKEN)
        else:
            texts.append(both[len(start) :])
    return _mend(server, ids, texts)


def _mend(server: Connection, ids: Sequence[int], texts: Sequence[str]) -> list[TokenText]:
    """The same with characters in place of their broken parts."""
    broken = [BROKEN in text for text in texts]
    spans = [
        (start, end)
        for start in range(len(ids))
        if broken[start]
        for end in range(start + 2, min(start + LONGEST, len(ids)) + 1)
        if all(broken[start:end])
    ]
    whole = dict(zip(spans, _decode(server, [list(ids[start:end]) for start, end in spans]), strict=True))
    found: list[TokenText] = []
    while (start := len(found)) < len(ids):
        ends = (end for end in range(start + 2, start + LONGEST + 1) if BROKEN not in whole.get((start, end), BROKEN))
        end = next(ends, None)
        if end is None:
            found.append(TokenText(ids[start], texts[start]))
        else:
            text = whole[start, end]
            found += [TokenText(ids[i], text if i == start else "", part_of=text) for i in range(start, end)]
    return found


def _decode(server: Connection, lists: Sequence[Sequence[int]]) -> list[str]:
    """The text of each list of ids, special tokens too."""
    texts: list[str] = []
    for first in range(0, len(lists), BATCH):
        part = [list(ids) for ids in lists[first : first + BATCH]]
        texts += server.post("/detokenize", {"tokens": part, "skip_special_tokens": False})["text"]
    return texts
