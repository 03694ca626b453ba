"""docs/hooks.md is the table of hooks, and its reasons are sentences."""

from __future__ import annotations

from pathlib import Path

import pytest

from claa_sglang.patches.hooks import Hook
from docs.generate import hooks

ROOT = Path(__file__).resolve().parents[3]


def test_the_document_is_the_table() -> None:
    assert (ROOT / "docs" / "hooks.md").read_text() == hooks.markdown(), "run: python -m docs.generate"


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        ("an aborted request runs dense", "An aborted request runs dense."),
        ("SGLang's check must see them.", "SGLang's check must see them."),
        ("one-token prompts are dense", "One-token prompts are dense."),
        ("sgl.Engine builds it on its own", "`sgl.Engine` builds it on its own."),
        ('custom_params["claa"] is checked here', '`custom_params["claa"]` is checked here.'),
        ("/server_info reads it", "`/server_info` reads it."),
    ],
)
def test_a_reason_becomes_a_sentence_and_code_keeps_its_case(reason: str, sentence: str) -> None:
    hook = Hook("sglang.srt.module.greet", ("name",), "around", print, "all", reason)
    assert f"| all | `module.greet` | around | `(name)` | {sentence} |\n" in hooks.markdown([hook])
