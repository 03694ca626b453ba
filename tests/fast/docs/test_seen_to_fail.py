"""Every row of "Seen to fail" in docs/tests.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]
TABLE = (TESTS.parent / "docs" / "tests.md").read_text().partition("## Seen to fail")[2]
ROWS = [line.split("|")[1].strip() for line in TABLE.splitlines() if line.startswith("| `")]
NAME = re.compile(r"`(test_\w+)(?:::(test_\w+)(…?))?`")


@pytest.mark.parametrize("row", ROWS)
def test_a_named_test_exists(row: str) -> None:
    names = NAME.findall(row)
    assert len(names) == row.count("`") // 2, "write a test as file::name, or file::begins…"
    for file, name, cut in names:
        texts = [path.read_text() for path in TESTS.rglob(f"{file}.py")]
        assert texts, f"there is no tests/**/{file}.py"
        begins = f"\ndef {name}" + ("" if cut else "(")
        assert not name or any(begins in text for text in texts), f"{file} has no {name}{cut}"


def test_rows_are_found() -> None:
    assert len(ROWS) > 40
