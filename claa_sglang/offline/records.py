"""Records of studies on disk: safetensors files whose header says what they were made from.

A file holds tensors and one JSON header. A reader states which model, prompt and options it means, and gets the record
of exactly these or an error: numbers of another model or prompt never pass for the right ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from claa_sglang.offline.basics import RecordError

_HEADER = "claa"
_SAMPLED = 64  # values of each parameter that its model is recognised by


class Subject(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a record is about.

    Attributes:
        kind: of record, such as "oracle".
        model: name of the model, for people.
        fingerprint: see `fingerprint`.
        prompt: see `prompt_hash`.
        tokens: length of the prompt.
        options: every choice that changes the numbers.
    """

    kind: str
    model: str
    fingerprint: str
    prompt: str
    tokens: int
    options: dict[str, int] = {}

    def filename(self) -> str:
        """A name of its own for every subject; the header decides, this only keeps them apart."""
        options = "".join(f"-{name[0]}{value}" for name, value in sorted(self.options.items()))
        return f"{self.kind}-{self.fingerprint[:8]}-{self.prompt[:16]}{options}.safetensors"


def subject(kind: str, model: Any, input_ids: Tensor, **options: int) -> Subject:
    """The subject of a record about a loaded transformers model and a prompt, int64 [N]."""
    return Subject(
        kind=kind,
        model=Path(model.config.name_or_path).name,
        fingerprint=fingerprint(model),
        prompt=prompt_hash(input_ids),
        tokens=input_ids.numel(),
        options=options,
    )


def prompt_hash(input_ids: Tensor) -> str:
    """SHA-256 of the token ids (little-endian int64), hexadecimal."""
    return hashlib.sha256(input_ids.cpu().to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()


def fingerprint(model: Any) -> str:
    """SHA-256 over name, shape, dtype and 64 values of every parameter, hexadecimal.

    Two models with equal fingerprints are the same for our purpose; the same weights in another dtype are not, as their
    scores differ.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample.tolist()}".encode())
    return digest.hexdigest()


def save(path: Path, about: Subject, answer: tuple[int, ...], tensors: Mapping[str, Tensor]) -> None:
    """Write a record whole or not at all, its directory included."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    header = msgspec.json.encode({"about": about, "answer": answer}).decode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={_HEADER: header})
    temporary.replace(path)


class _Header(msgspec.Struct, frozen=True):
    about: Subject
    answer: tuple[int, ...]


def load(path: Path, about: Subject) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """Answer ids and tensors (CPU) of the record at `path`. Raises RecordError unless it is about exactly `about`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = msgspec.json.decode((file.metadata() or {})[_HEADER], type=_Header)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, KeyError, msgspec.MsgspecError) as error:
        raise RecordError(f"{path}: not a record of ours: {error!r}; delete it, and it is made again") from error
    for field in Subject.__struct_fields__:
        found, wanted = getattr(header.about, field), getattr(about, field)
        # The name is for people: the same weights in another directory are the same model.
        if found != wanted and field != "model":
            raise RecordError(
                f"{path}: made for another {field}: {found}, not {wanted} (model {header.about.model}); give the "
                "model, prompt and options it was made with, or another directory"
            )
    return header.answer, tensors
