"""`claa-sglang doctor` with SGLang's own arguments: what it says is what a start would say, and it starts nothing."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from typing import Any

import pytest
from transformers import LlamaConfig

from claa_sglang.doctor import command
from claa_sglang.doctor.finding import Finding
from claa_sglang.doctor.machine import kernel_names
from tests.fast.argument_records import python

CASES: dict[str, tuple[str, ...]] = {
    "ready": ("--page-size", "16"),
    "refused": ("--enable-lora", "--page-size", "16", "--kv-cache-dtype", "fp8_e4m3", "--enable-claa"),
    "bad value": ("--claa-keep-rate", "3"),
    "no such flag": ("--no-such-flag",),
    "no such model": ("--model-path", "/nowhere/at/all"),
    "two rows": ("--claa-decode-dense-layers", "0", "--max-running-requests", "3"),
}
# All of them in one interpreter, as SGLang takes most of the time.
ASK = """
import contextlib, io, json, sys
from claa_sglang import cli
asked, answers = json.loads(sys.argv[1]), {}
for name, words in asked.items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = cli.main(["doctor", "--json", "--", *words])
    answers[name] = [status, json.loads(said.getvalue())]
said = io.StringIO()
with contextlib.redirect_stdout(said):
    status = cli.main(["doctor", "--", *asked["refused"]])
answers["as text"] = [status, said.getvalue()]
from claa_sglang.patches import hooks
answers["applied"] = hooks.applied_count()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 256}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(model)
    common = (
        "--model-path",
        str(model),
        "--device",
        "cpu",
        "--attention-backend",
        "torch_native",
        "--dtype",
        "float32",
    )
    asked = {name: (*common, *words) for name, words in CASES.items()}
    return json.loads(python(ASK, json.dumps(asked)))


def finding(answer: list[Any], name: str) -> dict[str, Any]:
    return next(one for one in answer[1]["findings"] if one["name"] == name)


def test_flags_that_work(answers: dict[str, Any]) -> None:
    status, record = answers["ready"]
    assert status == 0 and record["ready"] is True and record["would_start"] is None
    assert {one["name"]: one["ok"] for one in record["findings"]} == {
        "versions": None,
        "device": None,
        "hooks": True,
        "kernels": None,
        "arguments": True,
        "configuration": True,
        "flags and model": True,
        "memory": None,
    }
    assert "sglang 0.5.23" in finding(answers["ready"], "versions")["text"]
    assert "of 4 layers" in finding(answers["ready"], "configuration")["text"]


def test_flags_that_do_not_and_those_that_would(answers: dict[str, Any]) -> None:
    status, record = answers["refused"]
    assert status == 1 and record["ready"] is False
    refusals = finding(answers["refused"], "flags and model")["more"]
    assert [line.partition("]")[0] for line in refusals] == ["[fp8-kv", "[lora"]
    assert all("Remedy: " in line for line in refusals)
    assert record["would_start"][-3:] == ["--page-size", "16", "--enable-claa"]
    assert not {"--enable-lora", "--kv-cache-dtype"} & set(record["would_start"])


def test_as_text(answers: dict[str, Any]) -> None:
    status, text = answers["as text"]
    assert status == 1 and "NO  flags and model: 2 of them" in text and "It would with:\n  --model-path" in text


@pytest.mark.parametrize(
    ("name", "probe", "said"),
    [
        ("bad value", "configuration", "--claa-keep-rate 3.0: .*above 0, at most 1"),
        ("no such flag", "arguments", "unrecognized arguments: --no-such-flag"),
        ("no such model", "arguments", "/nowhere/at/all"),
    ],
)
def test_what_cannot_be_read_is_a_line(name: str, probe: str, said: str, answers: dict[str, Any]) -> None:
    status, record = answers[name]
    assert status == 1 and record["ready"] is False
    text = finding(answers[name], probe)["text"]
    assert re.search(said, text), text


def test_what_late_rows_take(answers: dict[str, Any]) -> None:
    assert "1 KiB for each running request" in finding(answers["ready"], "memory")["text"]
    assert "2 KiB for each running request, 0 MiB for 3" in finding(answers["two rows"], "memory")["text"]


def test_nothing_was_started(answers: dict[str, Any]) -> None:
    assert answers["applied"] == 0


def test_kernels_are_those_of_the_source() -> None:
    assert {"_store_kernel", "_load_kernel", "_mass_kernel", "_fold_kernel"} <= kernel_names()


@pytest.mark.parametrize("flags", [[], ["--", "--model-path", "m"]])
def test_no_flags_are_offered_where_none_would_help(flags: list[str], monkeypatch: Any, capsys: Any) -> None:
    """An attribute of SGLang that moved stops every start."""
    moved = Finding("hooks", False, "1 of 56 do not fit")
    monkeypatch.setattr(command, "try_start", lambda words: pytest.fail("looks for flags"))
    monkeypatch.setattr(command, "examine", lambda words: [moved, Finding("arguments", True, "")])
    for as_json in (False, True):
        assert command.run(Namespace(flags=flags, json=as_json)) == 1
    text, record = capsys.readouterr().out.split("\n{", 1)
    assert "would not start here, whatever its flags" in text
    assert json.loads("{" + record)["would_start"] is None
