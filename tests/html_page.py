"""A page as the standard library's parser reads it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any, NamedTuple


class Token(NamedTuple):
    """An element of the prompt. kept: whether it is a `mark`."""

    kept: bool
    classes: list[str]
    title: str
    text: str


class Page(HTMLParser):
    """elements: (tag, attributes) of all. tokens: of the prompt. data: what the script reads. text: of the body."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[Token] = []
        self.data: dict[str, Any] = {}
        self.text = ""
        self._inside: list[str] = []
        self._json = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        self._json = given.get("type") == "application/json"
        if (given.get("id") or "").startswith("t") and (given["id"] or "")[1:].isdigit():
            assert given["id"] == f"t{len(self.tokens)}"
            self.tokens.append(Token(tag == "mark", (given["class"] or "").split(), given["title"] or "", ""))
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._json:
            self.data, self._json = json.loads(data), False
        elif self._inside:
            self.tokens[-1] = self.tokens[-1]._replace(text=self.tokens[-1].text + data)
        else:
            self.text += data
