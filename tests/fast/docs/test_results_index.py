"""benchmarks/results/README.md has a row for every file beside it, and for no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
ROW = re.compile(r"^\| `([^`]+)` \|.*\| (\d{4}-\d\d-\d\d) \|$", re.MULTILINE)
ROWS = dict(ROW.findall((RESULTS / "README.md").read_text()))


def test_every_file_has_a_row() -> None:
    assert set(ROWS) == {path.name for path in RESULTS.iterdir()} - {"README.md"}


def test_dates_are_those_of_the_files() -> None:
    dated = {name: json.loads((RESULTS / name).read_text()).get("date") for name in ROWS if name.endswith(".json")}
    assert {name: date[:10] for name, date in dated.items() if date} == {
        name: ROWS[name] for name in dated if dated[name]
    }
