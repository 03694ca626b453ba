"""The documents as tests read them: fenced blocks, links, headings and code spans, each with its place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
_FENCE = re.compile(r"(?P<indent> *)(?P<mark>```+|~~~+)\s*(?P<tag>[^`]*)")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]+)(?:\s+\"[^\"]*\")?\)")
_HTML_LINK = re.compile(r"<(?:img|a)\b[^>]*\b(?:src|href)=\"(?P<target>[^\"]+)\"")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(?P<code>.+?)(?<!`)\1(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block. `where` is document:line of its fence, `language` the first word of its tag, "" without one."""

    where: str
    language: str
    text: str


@dataclass(frozen=True)
class Document:
    """One document: its fenced blocks, and its prose, with the fenced lines emptied so that line numbers hold."""

    path: Path
    blocks: tuple[Block, ...]
    prose: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    def links(self) -> list[tuple[str, str]]:
        """(where, target) of each link and image, code spans left out."""
        found = []
        for number, line in enumerate(self.prose, 1):
            text = _SPAN.sub("", line)
            found += [(f"{self.name}:{number}", m["target"]) for m in _LINK.finditer(text)]
            found += [(f"{self.name}:{number}", m["target"]) for m in _HTML_LINK.finditer(text)]
        return found

    def spans(self) -> list[tuple[str, str]]:
        """(where, code) of each code span that ends on the line it begins on."""
        return [
            (f"{self.name}:{number}", match["code"].strip())
            for number, line in enumerate(self.prose, 1)
            for match in _SPAN.finditer(line)
        ]

    def anchors(self) -> set[str]:
        """What `#...` may name here, as GitHub makes it of headings: a repeated one gets -1, -2, ..."""
        seen: dict[str, int] = {}
        names = set()
        for line in self.prose:
            if heading := re.fullmatch(r"#{1,6}\s+(.*?)\s*#*", line):
                title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
                slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
                names.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
                seen[slug] = seen.get(slug, 0) + 1
        return names


@cache
def read(path: Path) -> Document:
    """Parse one document. Raises AssertionError for a fence that is not closed."""
    blocks: list[Block] = []
    prose: list[str] = []
    opened: re.Match[str] | None = None
    begin, lines = 0, []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = _FENCE.fullmatch(line.rstrip())
        if opened is None and fence:
            opened, begin, lines = fence, number, []
        elif opened and fence and fence["mark"].startswith(opened["mark"]) and not fence["tag"]:
            language = (opened["tag"].split() or [""])[0]
            blocks.append(Block(f"{path.relative_to(ROOT)}:{begin}", language, "\n".join(lines)))
            opened = None
        elif opened:
            lines.append(line.removeprefix(opened["indent"]))
        else:
            prose.append(line)
            continue
        prose.append("")
    assert opened is None, f"{path.relative_to(ROOT)}:{begin}: this fence is never closed"
    return Document(path, tuple(blocks), tuple(prose))


def blocks(*languages: str) -> list[Block]:
    """All blocks of README.md and docs/ in one of these languages."""
    parts = [read(path) for path in DOCUMENTS if path == ROOT / "README.md" or ROOT / "docs" in path.parents]
    return [block for part in parts for block in part.blocks if block.language in languages]
