"""`claa-sglang explain` on a real server: the page is the report's, as a parser and as a browser read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from claa_sglang import cli
from claa_sglang.explain.asking import ask
from claa_sglang.explain.error import ExplainError
from claa_sglang.tools.connection import Connection
from tests.chromium import dom, needs_chromium
from tests.engine_server import Server
from tests.html_page import Page
from tests.routes_server import GREEDY, KEEP_RATE, SCORE_LAYERS, SENTENCE, options

pytestmark = pytest.mark.engine

NASTY = '</script><img src=x onerror="document.title=1">'
PROMPT = f"Ünïcödé 日本語 🎉 {NASTY}\n" + SENTENCE * 12 + "What crosses the bay?"
NEW = 6


@pytest.fixture(scope="module")
def page(routes_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command."""
    home = tmp_path_factory.mktemp("explain")
    (home / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    out = home / "made" / "page.html"
    given = ["--url", routes_server.url, "--prompt-file", str(home / "prompt.txt"), "--out", str(out)]
    assert cli.main(["explain", *given, "--max-new-tokens", str(NEW)]) == 0
    return out


def test_the_page_is_what_the_server_reports(routes_server: Server, page: Path) -> None:
    ids = routes_server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    params = options(policy="always", return_kept=True) | {"max_new_tokens": NEW}
    plain = routes_server.generate(input_ids=ids, sampling_params=params)
    report = plain["meta_info"]["claa"]
    assert "explain" not in report and report["kept_tokens"] == int(KEEP_RATE * len(ids))
    seen = Page(page.read_text(encoding="utf-8"))
    assert [i for i, token in enumerate(seen.tokens) if token.kept] == report["kept"]
    assert "".join(token.text for token in seen.tokens if "part" not in token.classes) == PROMPT
    assert plain["text"] in seen.text, "an explained answer is the answer"
    assert not any(tag == "img" for tag, _ in seen.elements)
    scored = [str(layer) for layer in SCORE_LAYERS]
    assert list(seen.data["views"]) == ["ranking", *scored, "answer", *(f"answer-{layer}" for layer in scored)]
    assert f"the answer's {NEW} tokens" in seen.text


def test_what_the_answer_looked_at_is_all_of_its_attention(routes_server: Server) -> None:
    found = ask(
        Connection(routes_server.url, error=ExplainError),
        PROMPT,
        chat=True,
        new=NEW,
        keep_rate=0.5,
        ranker="claa:paper",
    )
    assert found.report["keep_rate"] == 0.5 and found.report["ranker"] == "claa:paper"
    assert found.looking == found.answer_tokens <= NEW
    tokens = found.report["prompt_tokens"]
    assert "<|im_start|>" in found.tokens[0].text and len(found.tokens) == tokens
    assert PROMPT in "".join(token.text for token in found.tokens)
    for shares in found.looked_at.values():
        assert len(shares) == tokens and 0.1 < sum(share or 0.0 for share in shares) < 1


@needs_chromium
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    written = Page(page.read_text(encoding="utf-8"))
    seen = Page(dom(page, f"#layer={SCORE_LAYERS[0]}", tmp_path))
    assert dict(seen.elements)["body"]["data-layer"] == str(SCORE_LAYERS[0])
    assert [(token.kept, token.text) for token in seen.tokens] == [(token.kept, token.text) for token in written.tokens]
    assert all(f"layer {SCORE_LAYERS[0]}" in token.title for token in seen.tokens)
    assert [t.classes for t in seen.tokens] != [t.classes for t in written.tokens], "another layer, other shades"


def test_a_prompt_that_is_not_pruned(routes_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("Paris is")
    given = ["--url", routes_server.url, "--prompt-file", str(tmp_path / "prompt.txt"), "--out", str(tmp_path / "p")]
    assert cli.main(["explain", *given, "--max-new-tokens", "1"]) == 1
    said = capsys.readouterr().err
    assert "is not pruned (prompt shorter than 64 tokens" in said and said.count("\n") == 1
    assert cli.main(["explain", *given, "--keep-rate", "7"]) == 1
    assert "keep_rate" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_nothing_is_left(routes_server: Server) -> None:
    assert routes_server.generate(text="still here", sampling_params=GREEDY)["text"]
    assert not routes_server.left_behind()
