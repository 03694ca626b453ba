"""Every relative link of a document leads to a file, every anchor to a heading, and no line of prose is too long."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
LONGEST = 120


def prose(document: Path) -> Iterator[str]:
    """Lines outside fenced code."""
    code = False
    for line in document.read_text().splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield line


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, punctuation dropped, spaces as hyphens."""
    headings = [line.lstrip("#").strip().lower() for line in prose(document) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall("\n".join(prose(document))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = (document.parent / name).resolve() if name else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_wrapped(document: Path) -> None:
    assert [line for line in prose(document) if len(line) > LONGEST and not line.startswith("|")] == []
