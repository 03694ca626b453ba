"""Files that a document names are there: paths in code spans and in the figures of the architecture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HOMES = (ROOT, ROOT / "claa_sglang", ROOT / "docs")
# A folder and a file. What follows a comma in a figure is a file of the same folder.
NAMED = re.compile(r"(?<![\w/.*-])((?:[a-z_]+/)+)([a-z_]+\.(?:py|sh))((?:, [a-z_]+\.py)*)")


def named(text: str) -> set[str]:
    found = set()
    for folder, first, more in NAMED.findall(text):
        found |= {folder + name for name in [first, *more.split(", ")[1:]]}
    return found


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/rankings.md", "docs/quality.md", "docs/tests.md"],
)
def test_named_files_are_there(document: str) -> None:
    files = named((ROOT / document).read_text())
    assert [name for name in sorted(files) if not any((home / name).exists() for home in HOMES)] == []
