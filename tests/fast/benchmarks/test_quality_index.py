"""Answers are counted again where no prompt is, and forms of prompts have cells of their own."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import msgspec
import pytest

from benchmarks import eval_quality
from benchmarks.quality import index
from claa_sglang.tasks.record import Followup, Message, Prompt, save
from tests.fast.quality_server import PROMPTS, Server, result

RATES = ["--keep-rates", "0.3"]


def with_prefix(prompt: Prompt) -> Prompt:
    return msgspec.structs.replace(prompt, answer_prefix="It is", input_ids=[*(prompt.input_ids or []), 5])


def test_an_index_has_what_grading_needs(tmp_path: Path) -> None:
    chat = Prompt(
        task="copy",
        source="prose",
        length=64,
        seed=3,
        messages=[Message("user", "long text")],
        answers=["a", "b"],
        exact=True,
        answer_prefix="It is",
        followups=[Followup(question="and?", answers=["c"])],
    )
    ids = msgspec.structs.replace(chat, messages=None, input_ids=[1, 2], answer_prefix="")
    path = tmp_path / "index.jsonl.xz"
    index.save([index.of(chat), index.of(ids)], path)
    one, other = index.load(path)
    assert (one.key, other.key) == (chat.key, ids.key) and (one.form, other.form) == ("prefix", "chat")
    assert (one.task, one.source, one.length, one.seed, one.exact) == ("copy", "prose", 64, 3, True)
    assert one.answers == ["a", "b"] and [later.answers for later in one.followups] == [["c"]]
    assert not other.followups, "token ids cannot go on as a chat"
    assert b"long text" not in lzma.decompress(path.read_bytes())


def test_counted_by_the_index_is_counted_by_the_prompts(server: Server, command: list[str], tmp_path: Path) -> None:
    prompts = [*PROMPTS[::2], *map(with_prefix, PROMPTS[1::2])]
    save(prompts, tmp_path / "prompts.jsonl.gz")
    assert eval_quality.main([*command, *RATES]) == 0
    whole = result(tmp_path)
    index.save(map(index.of, prompts), tmp_path / "index.jsonl.xz")
    packed = tmp_path / "a.jsonl.xz"
    packed.write_bytes(lzma.compress((tmp_path / "q.answers.jsonl").read_bytes()))
    again = [str(tmp_path / "index.jsonl.xz"), "--index", "--answers", str(packed), "--out", str(tmp_path / "q.json")]
    assert eval_quality.main([*again, *RATES]) == 0
    counted = result(tmp_path)
    assert counted["cells"] == whole["cells"] and counted["held"] == whole["held"] and counted["count only"]
    assert whole["prompts"]["forms"] == {"chat": 20, "prefix": 20}
    cells = {(c["task"], c.get("form")): c for c in whole["cells"] if c["ranker"] == "claa"}
    assert {form: cells["a", form]["n"] for form in (None, "chat", "prefix")} == {None: 20, "chat": 10, "prefix": 10}
    assert cells["a", "chat"]["accuracy"][0] == 0.3 and sum(one["within"] for one in whole["held"]) == 0


def test_asked_now_and_counted_later(server: Server, command: list[str], tmp_path: Path) -> None:
    assert eval_quality.main([*command, *RATES, "--ask-only"]) == 0
    assert result(tmp_path)["cells"] == [] and len(server.bodies) == 80
    prompts, *_ = command
    count = [prompts, "--answers", str(tmp_path / "q.answers.jsonl"), "--out", str(tmp_path / "q.json"), *RATES]
    assert eval_quality.main(count) == 0 and len(server.bodies) == 80
    assert {cell["n"] for cell in result(tmp_path)["cells"]} == {20, 40}


def test_what_is_no_index_is_said(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        eval_quality.main([*command, "--index"])
    assert "holds no prompts to ask" in capsys.readouterr().err
    wrong = tmp_path / "prompts.jsonl"
    wrong.write_text(json.dumps({"prompt": "x", "answers": ["y"]}) + "\n")
    with pytest.raises(index.IndexFileError, match="line 1.*leave out --index"):
        index.load(wrong)
