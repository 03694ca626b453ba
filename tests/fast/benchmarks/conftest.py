"""What tests of benchmarks.eval_quality share."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import eval_quality
from claa_sglang.tasks.record import save
from tests.fast.quality_server import PROMPTS, Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    running = Server()
    monkeypatch.setattr(eval_quality, "endpoint_of", lambda args: running)
    return running


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    save(PROMPTS, tmp_path / "prompts.jsonl.gz")
    return [str(tmp_path / "prompts.jsonl.gz"), "--url", "none", "--out", str(tmp_path / "q.json"), "--in-flight", "7"]
