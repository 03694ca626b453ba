"""Rankings of prompts' tokens in a file, one prompt a line: how an oracle's ranking gets to `eval_quality --given`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec


class Ranking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line. key: of the prompt (`Prompt.key`). order: its positions, most important first."""

    key: str
    order: list[int]


def write(path: Path, rankings: Iterable[Ranking]) -> None:
    """Write JSONL to `path`."""
    path.write_bytes(msgspec.json.Encoder().encode_lines(list(rankings)))


def load(path: Path) -> dict[str, list[int]]:
    """Orders by prompt key. Raises msgspec.DecodeError for a line that is no ranking, OSError for no file."""
    lines = msgspec.json.Decoder(Ranking).decode_lines(path.read_bytes())
    return {line.key: line.order for line in lines}
