"""Files of answers and of indices, packed or not."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

PRESET = 3  # of xz: answers pack nearly as well as with 6, in a third of the time


def content_of(path: Path) -> bytes:
    """Unpacked, if the name ends in .xz or .gz. Raises OSError."""
    content = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(content)
        case ".gz":
            return gzip.decompress(content)
        case _:
            return content


def write(content: bytes, path: Path) -> None:
    """Packed, if the name ends in .xz. The file is there only once it is whole."""
    partial = path.with_name(f"partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(lzma.compress(content, preset=PRESET) if path.suffix == ".xz" else content)
    partial.replace(path)
