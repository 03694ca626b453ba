"""The command: what it refuses, in one line with a remedy, before it asks and after."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from claa_sglang import cli
from claa_sglang.explain.asking import _most_looking, _without_end
from tests.fast.verify.fake_server import Fake, serving

ALLOWED = {"config": {"window": 8, "allow_explain": True}}


def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str, prompt: bytes | None = b"words " * 50) -> str:
    """What it says on stderr, in one line; it must fail, and leave no page."""
    if prompt is not None:
        (tmp_path / "prompt.txt").write_bytes(prompt)
    out = tmp_path / "page.html"
    given = ["--prompt-file", str(tmp_path / "prompt.txt"), "--out", str(out), *words]
    assert cli.main(["explain", *given]) == 1
    said = capsys.readouterr()
    assert not out.exists() and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("claa-sglang explain: ")
    return said.err


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "prompt.txt: No such file or directory: give a file that can be read"),
        (b"", "prompt.txt: is empty: write the prompt into it"),
        (b" \n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"caf\xe9", r"is not UTF-8 text \(byte 3\): convert it"),
    ],
    ids=["missing", "empty", "blank", "a mark alone", "latin 1"],
)
def test_a_prompt_that_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, prompt: bytes | None, says: str
) -> None:
    assert re.search(says, run(capsys, tmp_path, prompt=prompt))


def test_a_page_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "prompt.txt" / "page.html", Path("/proc/page.html")):
        assert "--out" in (said := run(capsys, tmp_path, "--out", str(out))) and "can be written" in said


def test_nobody_answers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = run(capsys, tmp_path, "--url", "http://127.0.0.1:1")
    assert "no server answers at http://127.0.0.1:1: start a server, or correct --url" in said
    assert "correct --url" in run(capsys, tmp_path, "--url", "nonsense")


@pytest.mark.parametrize(
    ("fake", "says"),
    [
        (Fake(claa=False), "serves no CLAA: start it with --enable-claa"),
        (Fake(), "was started without --claa-allow-explain: start it with that flag"),
        (Fake(info={"claa": ALLOWED}, tokenizer=False), "has no tokenizer: start it without --skip-tokenizer-init"),
        (Fake(key="secret"), "wants an API key: give it with --api-key"),
    ],
    ids=["no CLAA", "not allowed", "no tokenizer", "a key"],
)
def test_servers_that_cannot_explain(capsys: pytest.CaptureFixture[str], tmp_path: Path, fake: Fake, says: str) -> None:
    with serving(fake) as url:
        assert says in run(capsys, tmp_path, "--url", url)


def test_an_existing_page_stays_where_nothing_is_explained(tmp_path: Path) -> None:
    (page := tmp_path / "page.html").write_text("before")
    (tmp_path / "prompt.txt").write_text("words")
    given = ["--url", "http://127.0.0.1:1", "--prompt-file", str(tmp_path / "prompt.txt"), "--out", str(page)]
    assert cli.main(["explain", *given]) == 1
    assert page.read_text() == "before" and os.listdir(tmp_path) != []


@pytest.mark.parametrize("words", [("--max-new-tokens", "0"), ("--max-new-tokens", "x"), ("--keep-rate", "x")])
def test_words_that_are_no_values(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["explain", "--prompt-file", "x", "--out", "y", *words])


@pytest.mark.parametrize(
    ("info", "most"),
    [
        ({"chunked_prefill_size": 8192, "page_size": 1}, 1024),
        ({"chunked_prefill_size": 256, "page_size": 16}, 241),
        ({"chunked_prefill_size": -1}, 1024),
        ({}, 1024),
    ],
)
def test_as_many_tokens_look_as_fit_a_chunk(info: dict[str, Any], most: int) -> None:
    assert _most_looking(info) == most


def test_the_token_that_ended_the_answer_is_no_part_of_it() -> None:
    def left(**reason: Any) -> list[int]:
        return _without_end({"output_ids": [5, 6, 2], "meta_info": {"finish_reason": reason}})

    assert left(type="stop", matched=2) == [5, 6]
    assert left(type="stop", matched="text") == left(type="length") == [5, 6, 2]
    assert _without_end({"output_ids": [2], "meta_info": {"finish_reason": {"type": "stop", "matched": 2}}}) == []
