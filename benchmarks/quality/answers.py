"""Answers on disk: appended as they come, so that a run that was stopped goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from benchmarks.quality.files import content_of


class AnswersError(RuntimeError):
    """The file of answers cannot be used; the message says what to do."""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the server said.

    prompt: `turn_key` of the prompt. setting: `Setting.name`. tokens: of the prompt. kept: of them, by the first prune
    step. cached, computed, ranker: early_cached_tokens, late_computed_tokens and ranker of the report; the last two are
    None for dense, and all are in files of older versions.
    first: (token id, log probability) of the likeliest first tokens, likeliest first; None if they were not asked for.
    """

    prompt: str
    setting: str
    text: str
    tokens: int
    kept: int
    first: list[tuple[int, float]] | None = None
    cached: int | None = None
    computed: int | None = None
    ranker: str | None = None


Known = dict[tuple[str, str], Answer]  # by prompt key and setting name


class Answers:
    """The answers in a JSONL file, whose first line says which server gave them.

    facts: what must not change between runs: model, versions, CLAA's configuration. Raises AnswersError if the file has
    others. A last line that was cut off when a run was killed is dropped.
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.known: Known = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            first, *rest = whole.splitlines()
            _same_server(msgspec.json.decode(first), msgspec.json.decode(msgspec.json.encode(facts)), path)
            decoder = msgspec.json.Decoder(Answer)
            for line in rest:
                self._remember(decoder.decode(line))
        self._file = path.open("r+b" if content else "wb")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._write(facts)

    def add(self, answer: Answer) -> None:
        self._remember(answer)
        self._write(answer)

    def close(self) -> None:
        self._file.close()

    def _remember(self, answer: Answer) -> None:
        self.known[answer.prompt, answer.setting] = answer

    def _write(self, item: Any) -> None:
        self._file.write(msgspec.json.encode(item) + b"\n")
        self._file.flush()


def read(path: Path) -> tuple[Known, dict[str, Any]]:
    """What a file of answers holds, less a last line that was cut off, and of which server. Raises AnswersError.

    The file may be packed (.xz, .gz).
    """
    content = content_of(path) if path.exists() else b""
    first, *rest = content[: content.rfind(b"\n") + 1].splitlines() or [b""]
    if not first:
        raise AnswersError(f"{path}: no answers there; give --url or --engine to ask for them")
    decoder = msgspec.json.Decoder(Answer)
    answers = [decoder.decode(line) for line in rest]
    return {(answer.prompt, answer.setting): answer for answer in answers}, msgspec.json.decode(first)


def _same_server(found: Any, facts: dict[str, Any], path: Path) -> None:
    if found == facts:
        return
    there = found if isinstance(found, dict) else {}
    differ = {name for name in {*facts, *there} if facts.get(name) != there.get(name)}
    raise AnswersError(
        f"{path} has answers of another server ({', '.join(sorted(differ))} differ): "
        "name another file with --answers, or remove it"
    )
