"""A machine and a model to plan for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import shapes
from claa_sglang.plan.machine import Machine
from claa_sglang.plan.model import shape_of

# About an H200's: its host launches while it computes.
GPU = Machine(
    device="a GPU",
    dtype="bfloat16",
    matmul=6e14,
    attention=5e14,
    bandwidth=4e12,
    request=7e-3,
    graph_layer=3e-4,
    eager_layer=1.2e-3,
    overlaps=True,
    memory=141 * 10**9,
    head_dim=128,
)
EIGHT_B = shape_of(shapes.SHAPES["llama-3.1-8b"], "8b")
TINY = shape_of(shapes.SHAPES["smollm2-135m"], "135m")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with the configuration of an 8B model and nothing else."""
    (home := tmp_path / "model").mkdir()
    (home / "config.json").write_text(json.dumps(shapes.SHAPES["llama-3.1-8b"]))
    return home
