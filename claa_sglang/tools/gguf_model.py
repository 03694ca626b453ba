"""A model as SGLang serves it, made from a GGUF file: safetensors, configuration, tokenizer and chat template.

transformers reads and unpacks the file. The weights are written as float32, so that `--dtype float32` serves exactly
what the file holds and `--dtype bfloat16` rounds once, or as bfloat16, which takes half the disk. The configuration
names bfloat16, which is what SGLang's `--dtype auto` then takes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MODELS = Path(".cache", "models")
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes of a value
# Raise it when the conversion changes, so that a directory made by an older one is made anew.
LAYOUT = 1
SOURCE = "source.json"  # what a directory was made from; its mark as one of ours
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")  # of every model
_BESIDE_WEIGHTS = 100_000_000  # bytes: tokenizer, configuration, and room to write them


class GgufError(RuntimeError):
    """The model cannot be prepared; the message says why and what to do."""


class Facts(NamedTuple):
    """What a GGUF file says of itself. experts, parts: 0 and 1 for a dense model in one file."""

    architecture: str
    name: str
    parameters: int
    experts: int
    parts: int
    has_tokenizer: bool
    has_template: bool


def prepare(gguf: Path, out: Path | None = None, dtype: str = "float32") -> Path:
    """Make the directory `out` of `gguf` unless it is there; returns its absolute path. Says on stderr what it does.

    out: by default `.cache/models/` and the model's name. dtype: of the weights, a key of DTYPES. The directory
    appears whole or not at all. Needs `accelerate`, `gguf` and memory for the weights in float32. Raises GgufError.
    """
    facts = read(gguf)
    directory = (out or MODELS / slug(facts.name or gguf.stem)).absolute()
    label = directory.name
    say(f"{label}: reading {gguf}")
    source = {"gguf": gguf.name, "gguf_sha256": _sha256(gguf), "layout": LAYOUT, "dtype": dtype}
    if is_prepared(directory, source):
        say(f"{label}: is there already, made from this file")
        return directory

    def make(temp: Path) -> Path:
        _require_room(temp, facts, dtype, out)
        say(f"{label}: unpacking {facts.parameters / 1e6:,.0f} million weights to {dtype}")
        if not facts.has_template:
            say(f"{label}: {gguf.name} has no chat template, so chat routes need --chat-template")
        convert(gguf, temp / "model", source, dtype)
        return temp / "model"

    return write(directory, source, FILES, make)


def read(gguf: Path) -> Facts:
    """What the file says of itself. Raises GgufError where it cannot be prepared, before anything is converted."""
    if not gguf.is_file():
        raise GgufError(f"{gguf}: {'is no file' if gguf.exists() else 'no such file'}; give the path of a GGUF file")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise GgufError(f"{error}; pip install accelerate gguf transformers") from error
    try:
        reader = GGUFReader(gguf)
        values = {key: _value(field) for key, field in reader.fields.items() if key in _READ or key.endswith(_EXPERTS)}
        facts = Facts(
            architecture=str(values.get("general.architecture", "")),
            name=str(values.get("general.name", "")),
            parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
            experts=max((int(count) for key, count in values.items() if key.endswith(_EXPERTS)), default=0),
            parts=int(values.get("split.count", 1)),
            has_tokenizer="tokenizer.ggml.tokens" in reader.fields,
            has_template="tokenizer.chat_template" in reader.fields,
        )
    except PermissionError as error:
        raise GgufError(f"{gguf}: cannot be read: {error}; make it readable for this user") from error
    except Exception as error:  # noqa: BLE001  (the reader has no error of its own)
        raise GgufError(f"{gguf}: is no whole GGUF file: {error}; download it again, and compare its size") from error
    _check(gguf, facts)
    return facts


_EXPERTS = ".expert_count"
_READ = ("general.architecture", "general.name", "split.count")


def _value(field: Any) -> Any:
    value = field.contents()
    return value if isinstance(value, str | int) else ""


def _check(gguf: Path, facts: Facts) -> None:
    if facts.parts > 1:
        raise GgufError(
            f"{gguf}: is one of {facts.parts} parts; merge them first, with llama.cpp's "
            "`llama-gguf-split --merge FIRST_PART WHOLE.gguf`"
        )
    if facts.experts:
        raise GgufError(
            f"{gguf}: is a mixture of {facts.experts} experts, and only dense models are prepared; serve the model's "
            "own safetensors"
        )
    if not facts.parameters:
        raise GgufError(f"{gguf}: has no weights; give the model's file, not one of its vocabulary")
    if not facts.has_tokenizer:
        raise GgufError(f"{gguf}: has no tokenizer; give a file that has one, as llama.cpp's conversion writes it")


def slug(name: str) -> str:
    """`name` as a directory's: lower case, letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "model"


def is_prepared(directory: Path, source: dict[str, Any], files: tuple[str, ...] = FILES) -> bool:
    """Whether `directory` holds all of `files`, made from `source`, whose file may meanwhile have another name."""
    try:
        found = json.loads((directory / SOURCE).read_text())
    except (OSError, ValueError):
        return False
    same = isinstance(found, dict) and {**found, "gguf": ""} == {**source, "gguf": ""}
    return same and all((directory / name).is_file() for name in files)


def write(directory: Path, source: dict[str, Any], files: tuple[str, ...], make: Callable[[Path], Path]) -> Path:
    """Put the directory that `make` makes into place, whole or not at all; returns it.

    make: called with an empty directory beside `directory`, returns the finished one in it. What is in the place is
    replaced if this command made it. Raises GgufError.
    """
    if directory.exists() and not _is_ours(directory):
        raise GgufError(f"{directory}: is there and was not made by this command; remove it, or give another --out")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temp:
            _publish(make(Path(temp)), directory, source, files)
    except OSError as error:
        raise GgufError(f"cannot write {directory}: {error}; give an --out with room that can be written") from error
    say(f"{directory.name}: ready in {directory}")
    return directory


def _is_ours(directory: Path) -> bool:
    return directory.is_dir() and ((directory / SOURCE).is_file() or not any(directory.iterdir()))


def _publish(made: Path, directory: Path, source: dict[str, Any], files: tuple[str, ...]) -> None:
    if directory.exists() and not is_prepared(directory, source, files):
        shutil.rmtree(directory)
    try:
        made.rename(directory)
    except OSError:
        # Another process was faster; its directory is as good.
        if not is_prepared(directory, source, files):
            raise


def _require_room(where: Path, facts: Facts, dtype: str, out: Path | None) -> None:
    needed = facts.parameters * DTYPES[dtype] + _BESIDE_WEIGHTS
    if (free := shutil.disk_usage(where).free) < needed:
        half = "" if dtype == "bfloat16" else ", or --dtype bfloat16, which needs half"
        raise GgufError(
            f"the model needs {needed / 1e9:.1f} GB and {where.parent} has {free / 1e9:.1f} GB free; make room, or "
            f"give {'another' if out else 'an'} --out on another disk{half}"
        )


def convert(gguf: Path, out: Path, source: dict[str, Any], dtype: str = "float32") -> None:
    """Write weights, configuration, tokenizer, chat template if there is one, and `source` to the new directory `out`.

    Raises GgufError.
    """
    try:
        import accelerate  # noqa: F401  (transformers asks for it only after loading)
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise GgufError(f"{error}; pip install accelerate gguf transformers") from error
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        AutoConfig.from_pretrained(**where)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever the loader stumbles over, it cannot read this model)
        raise GgufError(
            f"{gguf}: transformers cannot read it: {error or type(error).__name__}; serve the model's own safetensors"
        ) from error
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # Plain weights from here on: a server must not look for a GGUF kernel.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(getattr(torch, dtype)).save_pretrained(out, max_shard_size="1TB")
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    for leftover in ("quantization_config", "_model_name_or_path"):
        config.pop(leftover, None)
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / SOURCE).write_text(json.dumps(source, indent=2) + "\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def say(line: str) -> None:
    """A line of progress on stderr: stdout is for the path."""
    print(line, file=sys.stderr, flush=True)
