"""The load benchmark in small: under load every answer is the one it gives alone, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import load
from tests.engine_server import QUICKER

pytestmark = pytest.mark.engine


def test_load_changes_no_answer(tmp_path: Path, small_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUICKER.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "load.json"
    status = load.main(["--requests", "60", "--out", str(out)])
    result = json.loads(out.read_text())
    assert status == 0 and not result["failures"], result["failures"]
    counts = result["counts"]
    assert counts["errors"] == counts["different alone"] == 0
    assert counts["identical alone"] + counts["near-ties"] == counts["answered"] > 50
    assert counts["retracted: forced"] > 10
