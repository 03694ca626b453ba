"""docs/combinations.md says what the rules say, and the tests it names exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from docs.generate import combinations

ROOT = Path(__file__).resolve().parents[3]


def test_the_document_is_what_the_rules_say() -> None:
    text = (ROOT / "docs" / "combinations.md").read_text()
    assert text == combinations.markdown(), "python -m docs.generate"


@pytest.mark.parametrize("named", [row.test for row in combinations.WORKS])
def test_a_named_test_exists(named: str) -> None:
    file, name = named.split("::")
    module = ast.parse((ROOT / "tests" / "engine" / file).read_text())
    assert name in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
