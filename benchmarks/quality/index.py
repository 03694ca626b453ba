"""What grading needs of prompts, without their text: so that answers can be counted again where no prompt is.

The index of 6,600 prompts of up to 30,000 tokens is some hundred KB packed, and the prompts are hundreds of MB.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from benchmarks.quality import files
from claa_sglang.tasks.record import Prompt


class IndexFileError(ValueError):
    """A file is no index; the message names the file and the line."""


class Later(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A follow-up question: the answers expected."""

    answers: list[str]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One prompt. Fields are those of `Prompt`; key: of the answers.

    followups: none for a prompt of token ids, which cannot go on as a chat.
    """

    key: str
    task: str
    source: str
    form: str
    length: int
    seed: int
    answers: list[str]
    exact: bool = False
    followups: list[Later] = []


def of(prompt: Prompt) -> Entry:
    return Entry(
        key=prompt.key,
        task=prompt.task,
        source=prompt.source,
        form=prompt.form,
        length=prompt.length,
        seed=prompt.seed,
        answers=prompt.answers,
        exact=prompt.exact,
        followups=[Later(one.answers) for one in prompt.followups] if prompt.messages else [],
    )


def save(entries: Iterable[Entry], path: Path) -> None:
    """As JSONL, packed if the name ends in .xz. Raises OSError."""
    files.write(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries), path)


def load(path: Path) -> list[Entry]:
    """Raises IndexFileError for a line that is no entry, and OSError."""
    decoder = msgspec.json.Decoder(Entry)
    found = []
    for number, line in enumerate(files.content_of(path).splitlines(), 1):
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise IndexFileError(
                f"{path}, line {number}: {error}. Is it a file of prompts? Then leave out --index"
            ) from error
    return found
