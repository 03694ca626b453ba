"""Texts of single tokens, from decoders that are those of byte-level and of SentencePiece tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from claa_sglang.explain.texts import BATCH, TokenText, token_texts
from claa_sglang.tools.connection import Connection

Decode = Callable[[Sequence[int]], str]


class Server:
    """Answers /detokenize by `decode`."""

    def __init__(self, decode: Decode) -> None:
        self.decode, self.longest = decode, 0

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "/detokenize" and body["skip_special_tokens"] is False
        self.longest = max(self.longest, len(body["tokens"]))
        return {"text": [self.decode(ids) for ids in body["tokens"]]}


def texts(decode: Decode, ids: Sequence[int]) -> list[TokenText]:
    return token_texts(cast(Connection, Server(decode)), ids)


def of_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


PIECES = ("▁Hello", "▁world", "!", "▁", "<0xE6>", "<0x97>", "<0xA5>", "\n")


def of_pieces(ids: Sequence[int]) -> str:
    """As SentencePiece: bytes become characters, and a text's first space is dropped."""
    data = b"".join(
        bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()
        for piece in (PIECES[i] for i in ids)
    )
    return data.decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize("text", ["plain", "Ünïcödé", "日本語 🎉!", "👩‍👩‍👧", "é" * 40, "\x00\x1b"], ids=ascii)
def test_characters_of_several_tokens_are_shown_by_the_first(text: str) -> None:
    found = texts(of_bytes, list(text.encode()))
    assert "".join(token.text for token in found) == text
    for character in text:
        parts = [token for token in found if token.part_of == character]
        size = len(character.encode())
        assert len(parts) == (0 if size == 1 else size * text.count(character))


def test_what_is_no_character_is_shown_as_one_that_is_none() -> None:
    found = texts(of_bytes, [65, 0xFF, 0xC3, 66])
    assert [token.text for token in found] == ["A", "\ufffd", "\ufffd", "B"]
    assert not any(token.part_of for token in found)
    # A prompt may have the character that stands for none.
    assert [token.text for token in texts(of_bytes, list("a\ufffd".encode()))] == ["a", *["\ufffd"] * 3]


def test_spaces_that_a_decoder_drops_at_the_start_are_there() -> None:
    ids = [0, 1, 2, 1, 3, 4, 5, 6, 7, 0]
    found = texts(of_pieces, ids)
    assert [token.text for token in found] == [
        *("Hello", " world", "!", " world", " ", "日", "", "", "\n", " Hello"),
    ]
    assert [token.part_of for token in found][5:8] == ["日"] * 3


def test_many_tokens_are_asked_for_in_batches() -> None:
    server = Server(of_pieces)
    ids = [i % 4 for i in range(9 * BATCH)]
    found = token_texts(cast(Connection, server), ids)
    assert len(found) == len(ids) and server.longest <= BATCH
