"""One prompt with its expected answers, and the JSONL files that hold them, one prompt a line.

The task generators write these files and users may write their own: only a prompt (`messages`, `prompt` or `input_ids`)
is required. Files that end in .xz or .gz are compressed; xz packs filler text best, as sentences repeat far apart.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Literal, cast

import msgspec

USER = "user"  # task and source of prompts that no generator made
PREFIX, CHAT = "prefix", "chat"  # forms of a prompt


class PromptError(ValueError):
    """A file of prompts cannot be used. The text names the file, the line and the field."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a chat, as chat templates take it."""

    role: str
    content: str


class Followup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Another question about the text of a prompt. Fields are as those of `Prompt`; needles: what answers it."""

    question: str
    answers: list[str]
    answer_prefix: str = ""
    needles: list[str] = []


class Prompt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A prompt and what its answer must contain. Exactly one of `messages`, `prompt` and `input_ids` is given.

    task, source: what is asked, and the text it is hidden in; results are tabulated by them.
    length: tokens the prompt was made for (its own are at most so many); 0 if it was made for none.
    seed: with task, source and length it determines a generated prompt.
    messages: a chat, to be rendered by the model's chat template. prompt: plain text. input_ids: token ids, sent as
        they are; they end with the answer prefix, if there is one.
    answers: strings that a right answer contains. exact: they count with their case and as whole words (`grade`).
    answer_prefix: how the answer begins, already said for the model.
    needles: the strings that were placed in the text, in order.
    max_new_tokens: room for the answer; None leaves it to the caller.
    followups: questions that may be asked next, in this order, in the same chat; graded like the prompt.
    """

    task: str = USER
    source: str = USER
    length: int = 0
    seed: int = 0
    messages: list[Message] | None = None
    prompt: str | None = None
    input_ids: list[int] | None = None
    answers: list[str] = []
    exact: bool = False
    answer_prefix: str = ""
    needles: list[str] = []
    max_new_tokens: int | None = None
    followups: list[Followup] = []

    def __post_init__(self) -> None:
        given = [name for name in ("messages", "prompt", "input_ids") if getattr(self, name)]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"exactly one of messages, prompt and input_ids must be given and not empty, got {found}")

    @property
    def key(self) -> str:
        """16 hex digits that name what is sent to the model, and the answers, needles and labels not."""
        sent = msgspec.json.encode([self.messages, self.prompt, self.input_ids, self.answer_prefix])
        return hashlib.sha256(sent).hexdigest()[:16]

    @property
    def form(self) -> str:
        """How the prompt ends: PREFIX: with the beginning of its answer; CHAT: without, as a chat does."""
        return PREFIX if self.answer_prefix else CHAT


def load(path: Path) -> list[Prompt]:
    """All prompts of a JSONL file; empty lines are skipped.

    Raises PromptError for a line that is no prompt, naming line and field, and for a file without prompts; OSError if
    the file cannot be read.
    """
    decoder = msgspec.json.Decoder(Prompt)
    prompts = []
    with _open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                prompts.append(decoder.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise PromptError(
                    f"{path}, line {number}: {error}. Fields: {', '.join(Prompt.__struct_fields__)}"
                ) from error
    if not prompts:
        raise PromptError(f"{path}: no prompts. Write one JSON object a line, such as {_EXAMPLE}")
    return prompts


def save(prompts: Iterable[Prompt], path: Path) -> int:
    """Write `prompts` as they come, and return how many there were. The file is there only once it is whole."""
    partial = path.with_name(f"partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with _open(partial, "wb") as file:
        for prompt in prompts:
            file.write(msgspec.json.encode(prompt) + b"\n")
            count += 1
    partial.replace(path)
    return count


_EXAMPLE = '{"prompt": "The capital of France is", "answers": ["Paris"]}'


def _open(path: Path, mode: Literal["rb", "wb"]) -> IO[bytes]:
    match path.suffix:
        case ".xz":
            return cast(IO[bytes], lzma.open(path, mode))
        case ".gz":
            return cast(IO[bytes], gzip.open(path, mode))
        case _:
            return path.open(mode)
