"""Further questions in one chat."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eval_quality
from benchmarks.quality.turns import TurnsError, with_turns
from claa_sglang.tasks.record import Followup, Message, Prompt, save
from tests.fast.quality_server import Server, result


def chat(task: str, seed: int, followups: int) -> Prompt:
    more = [Followup(question=f"and {n}?", answers=["7"], answer_prefix="it is") for n in range(followups)]
    first = Message("user", f"{task} {seed}")
    return Prompt(task=task, source="s", length=9, messages=[first], answers=["7"], answer_prefix="is", followups=more)


def test_turns_go_on_with_what_was_said(
    server: Server, tmp_path: Path, monkeypatch: Any, small_model_path: Path, capsys: Any
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model_path)
    monkeypatch.setattr(
        Server, "info", lambda self, info=Server.info: info(self) | {"tokenizer_path": str(small_model_path)}
    )
    prompts = [chat("a", seed, 3) for seed in range(4)] + [chat("b", seed, 1) for seed in range(4)]
    save(prompts, tmp_path / "p.jsonl")
    command = [str(tmp_path / "p.jsonl"), "--url", "none", "--out", str(tmp_path / "q.json"), "--keep-rates", "0.5"]
    server.fail_after = 11
    with pytest.raises(RuntimeError, match="planted"):
        eval_quality.main([*command, "--turns", "3"])
    server.fail_after = math.inf
    assert eval_quality.main([*command, "--turns", "3"]) == 0
    assert "4 prompts without 3 turns are left out" in capsys.readouterr().out
    assert len(server.bodies) == 4 * 2 * 3, "what was answered before is not asked again"
    sent = [tokenizer.decode(body["input_ids"]) for body in server.bodies]
    last = [one for one in sent if one.endswith("it is") and "and 1?" in one]
    assert len(last) == 4 * 2
    for one in last:  # the server's own answers, behind the prefixes
        end, begin = "<|im_end|>\n<|im_start|>", "assistant\n"
        assert re.search(
            re.escape(begin) + r"is [78]" + re.escape(f"{end}user\nand 0?{end}{begin}") + "it is [78]<", one
        )
    found = {(c.get("turn", 1), c["task"], c["ranker"]): c for c in result(tmp_path)["cells"]}
    assert {at for at in found if at[1] == "a"} == {(n, "a", r) for n in (1, 2, 3) for r in ("dense", "claa")}
    assert all(cell["n"] == 4 for cell in found.values())
    tokens = [found[turn, "a", "claa"]["tokens"]["prompt"] for turn in (1, 2, 3)]
    assert tokens == sorted(set(tokens)) and "late_computed" not in found[3, "a", "dense"]["tokens"]
    assert [(one["turn"], one["within"] + one["interval"]) for one in result(tmp_path)["held"]] == [
        (1, 1),
        (2, 1),
        (3, 1),
    ]
    assert eval_quality.main([*command, "--turns", "3"]) == 0 and len(server.bodies) == 24


def test_prompts_without_turns_are_refused() -> None:
    with pytest.raises(TurnsError, match="no prompt has 2 follow-ups: ask for multi-key or the copies"):
        with_turns([chat("a", 0, 1)], 3)
    ids = Prompt(input_ids=[1], answers=["7"], followups=chat("a", 0, 1).followups)
    with pytest.raises(TurnsError, match="without --token-ids"):
        with_turns([ids], 2)
