"""docs/plan.md shows what `claa-sglang plan` prints today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import shapes
from claa_sglang import cli
from tests.conftest import ROOT
from tests.documents import read

BLOCKS = [block.text for block in read(ROOT / "docs" / "plan.md").blocks if block.language == "text"]


def printed(home: Path, shape: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    home.mkdir()
    (home / "config.json").write_text(json.dumps(shapes.SHAPES[shape]))
    assert cli.main(["plan", "--model", str(home), "--machine", "h200", *more]) == 0
    return capsys.readouterr().out


def test_the_plan_of_8b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(tmp_path / "llama-3.1-8b", "llama-3.1-8b", capsys, "--prompt-tokens", "32768").strip() == BLOCKS[0]


def test_the_table_of_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--prompt-tokens", "4000", "--keep-rate", "0.2")
    text = printed(tmp_path / "smollm2-135m-instruct", "smollm2-135m", capsys, *more)
    assert len(BLOCKS[1].splitlines()) == 10 and text.startswith(BLOCKS[1] + "\n")
