"""The page: kept tokens are marked, text of the prompt is text, every view has its numbers."""

from __future__ import annotations

import re

import pytest

from claa_sglang.explain.page import make_page, survived
from claa_sglang.explain.views import levels, make_views
from tests.fast.explain.samples import KEPT, LOOKED_AT, NASTY, SCORES, TEXTS, explained
from tests.html_page import Page


def test_kept_tokens_are_marked_with_their_scores() -> None:
    page = Page(make_page(explained()))
    assert [i for i, token in enumerate(page.tokens) if token.kept] == KEPT
    assert len(page.tokens) == len(TEXTS)
    assert page.tokens[2].title == "2: kept, score 9"
    assert page.tokens[1].title == "1: dropped, score 1.5"
    assert page.tokens[4].title == "4: dropped, score none"
    assert page.tokens[13].title == "13: kept, in the window"
    assert page.tokens[2].classes == ["q4"] and "qn" in page.tokens[4].classes


def test_text_of_the_prompt_is_text() -> None:
    """No element and no attribute comes from it, and what would hide or turn text is written out."""
    html = make_page(explained())
    page, plain = Page(html), Page(make_page(explained(answer="plain")))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert not any(tag == "img" or "onerror" in given for tag, given in page.elements)
    assert page.tokens[2].text == NASTY and page.tokens[8].text == " &amp;" and page.tokens[12].text == "&"
    assert page.tokens[4].text == "\\u202eevil" and page.tokens[5].text == "\\u0000\\u0007"
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", html)
    assert NASTY in page.text and "some/<model>" in page.text
    assert [tag for tag, _ in page.elements].count("script") == 2 and html.count("</script>") == 2


def test_the_file_asks_for_nothing() -> None:
    page = Page(make_page(explained()))
    for tag, given in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert "src" not in given and not any(name.startswith("on") for name in given)
        assert given.get("href", "#").startswith("#")
    (policy,) = [
        given["content"] for tag, given in page.elements if given.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy and policy.startswith("default-src 'none'")


def test_parts_of_a_character_show_it_once() -> None:
    page = Page(make_page(explained()))
    assert (page.tokens[6].text, page.tokens[7].text) == ("é", "‹")
    assert page.tokens[7].title.endswith("part of é") and "part" in page.tokens[7].classes


def test_views_have_a_number_for_each_token() -> None:
    page = Page(make_page(explained()))
    views = page.data["views"]
    assert list(views) == ["ranking", "18", "21", "answer", "answer-18", "answer-21"]
    assert views["ranking"]["values"] == SCORES + [None] * 3 and page.data["first"] == "ranking"
    assert views["answer-18"]["values"] == LOOKED_AT
    assert views["answer"]["values"][0] == pytest.approx((LOOKED_AT[0] + LOOKED_AT[-1]) / 2)
    options = [given["value"] for tag, given in page.elements if tag == "option"]
    assert options == list(views)


def test_two_prunes() -> None:
    found = explained(prunes=2)
    page = Page(make_page(found))
    assert survived(found.report) == [2, 0, 1, 0, 0, 0, 1, 0, 0, 2, 1, 2, 2, 2]
    assert [i for i, token in enumerate(page.tokens) if token.kept] == [0, 9, 11, 12, 13]
    assert page.tokens[2].title.startswith("2: dropped by prune 2") and "some" in page.tokens[2].classes
    assert page.tokens[1].title.startswith("1: dropped, ")
    second = next(view for view in make_views(found) if view.key == "ranking-2").values
    assert [i for i, value in enumerate(second) if value is not None] == KEPT[:-3]
    assert "after layer 21, ranked by layers 18, 21; after layer 25, ranked by layers 25" in page.text
    assert "8, then 5 tokens" in page.text
    assert "that the first prune kept" in page.text and page.text.count("dropped by prune 2") == 3
    assert "an earlier prune" in page.text and "an earlier prune" not in Page(make_page(explained())).text


def test_what_the_answer_looked_at() -> None:
    page = Page(make_page(explained()))
    links = [given["href"] for tag, given in page.elements if tag == "a"]
    # By the mean of both layers: without the first token and the window, which are always kept.
    means = [(a + b) / 2 for a, b in zip(LOOKED_AT, LOOKED_AT[::-1], strict=True)]
    assert links == [f"#t{i}" for i in sorted(range(1, 11), key=lambda i: (-means[i], i))]
    kept = sum(means[i] for i in KEPT) / sum(means)
    assert f"{100 * kept:.3g} %" in page.text
    free = range(1, 11)
    assert f"{100 * sum(means[i] for i in free if i in KEPT) / sum(means[i] for i in free):.3g} %" in page.text
    assert "the answer's 4 tokens" in page.text and "dropped" in page.text


def test_an_empty_answer() -> None:
    page = Page(make_page(explained(answer="", looking=0)))
    assert "The answer is empty." in page.text and "Nothing: the answer has no token" in page.text
    assert list(page.data["views"]) == ["ranking", "18", "21"]


def test_levels_are_shares_of_the_tokens_with_a_value() -> None:
    values = [float(i) for i in range(200)] + [None]
    found = levels(values)
    assert found[-1] == "qn" and found[199] == found[198] == "q4" and found[197] == "q3"
    assert [found.count(name) for name in ("q4", "q3", "q2", "q1", "q0")] == [2, 8, 30, 60, 100]
    assert levels([1.0, 1.0, 1.0]) == ["q4", "q0", "q0"]


def test_it_is_readable_without_colour_and_by_name() -> None:
    page = Page(make_page(explained()))
    tags = {tag for tag, _ in page.elements}
    assert {"main", "h1", "h2", "label", "caption", "output", "noscript"} <= tags
    assert dict(page.elements)["html"]["lang"] == "en"
    for words in ("A kept token is underlined", "dropped", "best 1 %"):
        assert words in page.text
