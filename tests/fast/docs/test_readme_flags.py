"""README.md has a row for every flag, and for no other."""

from __future__ import annotations

import re
from pathlib import Path

from claa_sglang.config.flags import HELP

README = Path(__file__).resolve().parents[3] / "README.md"


def test_every_flag_has_a_row() -> None:
    rows = re.findall(r"^\| `(--claa-[a-z-]+)` \|", README.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(f"--claa-{name.replace('_', '-')}" for name in HELP)
