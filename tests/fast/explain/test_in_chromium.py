"""The page in a browser: its script runs under its own policy, and the selector shows other layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from claa_sglang.explain.page import make_page
from claa_sglang.explain.views import levels, make_views
from tests.chromium import dom, needs_chromium
from tests.fast.explain.samples import KEPT, NASTY, explained
from tests.html_page import Page

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(make_page(explained()), encoding="utf-8")
    return file


@pytest.mark.parametrize("key", ["", "ranking", "18", "21", "answer", "no such layer"])
def test_a_layer_is_chosen_by_its_fragment(page: Path, tmp_path: Path, key: str) -> None:
    views = {view.key: view for view in make_views(explained())}
    html = dom(page, f"#layer={key}" if key else "", tmp_path)
    seen, view = Page(html), views.get(key, views["ranking"])
    assert dict(seen.elements)["body"]["data-layer"] == view.key
    assert [i for i, token in enumerate(seen.tokens) if token.kept] == KEPT
    # The script shades as the page that was written does.
    assert [token.classes[-1] for token in seen.tokens] == levels(view.values)
    places = [token.title.rpartition("place ")[2] for token in seen.tokens if "place" in token.title]
    assert len(places) == sum(value is not None for value in view.values)
    best = levels(view.values).index("q4")
    assert f"{view.label} {view.values[best]:.4g}, place 1 of " in seen.tokens[best].title
    assert seen.tokens[best].title.startswith(f"{best}: {'kept' if best in KEPT else 'dropped'}, ")


def test_nothing_of_the_prompt_became_an_element(page: Path, tmp_path: Path) -> None:
    seen = Page(dom(page, "", tmp_path))
    assert not any(tag == "img" for tag, _ in seen.elements)
    assert seen.tokens[2].text == NASTY
