"""A GGUF file becomes a directory that is exactly its model, whole or not at all; errors say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from claa_sglang import cli
from claa_sglang.tools import gguf_model
from claa_sglang.tools.gguf_model import GgufError, prepare
from tests import tiny_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file, and the weights in it."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, tiny_gguf.write(file)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_directory_is_the_model_of_the_file(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, dtype: str | None
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    file, weights = tiny
    monkeypatch.chdir(tmp_path)
    assert cli.main(["model", "--gguf", str(file), *(["--dtype", dtype] if dtype else [])]) == 0
    said = capsys.readouterr()
    made = tmp_path / ".cache/models/tiny-qwen2-test"
    assert said.out == f"{made}\n" and f"unpacking 0 million weights to {dtype or 'float32'}" in said.err
    found = load_file(made / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight.to(getattr(torch, dtype or "float32"))), name
    config = json.loads((made / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    assert {key: config[key] for key in tiny_gguf.SHAPE} == tiny_gguf.SHAPE
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.model_max_length == 512 and tokenizer.decode(tokenizer("hello, hé").input_ids) == "hello, hé"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    assert set(json.loads((made / "source.json").read_text())) == {"gguf", "gguf_sha256", "layout", "dtype"}


class Change(NamedTuple):
    """Something about a prepared directory or its file, and whether it is prepared again."""

    name: str
    change: Callable[[Path, Path], object]
    again: bool


CHANGES = (
    Change("nothing", lambda file, made: None, False),
    Change("another name", lambda file, made: file.rename(file.with_name("b.gguf")), False),
    Change("another file", lambda file, made: file.write_bytes(file.read_bytes() + b"\0"), True),
    Change("no weights", lambda file, made: (made / "model.safetensors").unlink(), True),
    Change("an older layout", lambda file, made: _set(made, layout=0), True),
    Change("another dtype", lambda file, made: _set(made, dtype="bfloat16"), True),
    Change("damaged", lambda file, made: (made / "source.json").write_text("{"), True),
)


def _set(made: Path, **changes: Any) -> None:
    source = json.loads((made / "source.json").read_text())
    (made / "source.json").write_text(json.dumps({**source, **changes}))


@pytest.mark.parametrize("case", CHANGES, ids=lambda case: case.name)
def test_it_is_prepared_again_where_something_differs(tiny: Any, tmp_path: Path, case: Change) -> None:
    file = shutil.copy(tiny[0], tmp_path / "a.gguf")
    made = prepare(file, tmp_path / "model")
    inode = made.stat().st_ino
    case.change(file, made)
    (file,) = tmp_path.glob("*.gguf")
    assert prepare(file, made) == made and (made / "model.safetensors").is_file()
    assert (made.stat().st_ino != inode) == case.again


def test_a_model_without_a_chat_template_is_prepared_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tiny_gguf.write(tmp_path / "Plain_1.gguf", name="", template="")
    made = prepare(tmp_path / "Plain_1.gguf", tmp_path / "model")
    assert (made / "tokenizer.json").is_file() and not (made / "chat_template.jinja").exists()
    assert "has no chat template, so chat routes need --chat-template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Qwen2.5 Coder 0.5B Instruct", "qwen2.5-coder-0.5b-instruct"), ("../x", "x"), ("Größe", "gr-e"), ("..", "model")],
)
def test_the_default_directory_is_named_after_the_model(name: str, expected: str) -> None:
    assert gguf_model.slug(name) == expected


# --- what cannot be prepared


@pytest.mark.parametrize(
    ("given", "says", "remedy"),
    [
        ({"architecture": "clip"}, "architecture clip is not supported", "serve the model's own safetensors"),
        ({"parts": 3}, "one of 3 parts", "llama-gguf-split --merge"),
        ({"experts": 8}, "mixture of 8 experts", "serve the model's own safetensors"),
        ({"tokenizer": False}, "has no tokenizer", "give a file that has one"),
        ({"weights": False}, "has no weights", "give the model's file"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_prepared_is_named_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture, given: dict, says: str, remedy: str
) -> None:
    (home := tmp_path / "home").mkdir()
    tiny_gguf.write(tmp_path / "x.gguf", **given)
    assert cli.main(["model", "--gguf", str(tmp_path / "x.gguf"), "--out", str(home / "model")]) == 1
    said = capsys.readouterr()
    error = said.err.splitlines()[-1]
    assert error.startswith(f"claa-sglang model: {tmp_path / 'x.gguf'}: ") and says in error and remedy in error
    assert not said.out and not list(home.iterdir()), "nothing is left behind"


def test_files_that_are_no_gguf(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="no such file; give the path"):
        prepare(tmp_path / "none.gguf")
    with pytest.raises(GgufError, match="is no file; give the path"):
        prepare(tmp_path)
    whole = tiny[0].read_bytes()
    for content in (b"", b"no gguf at all", whole[:100], whole[:-5000], whole[: len(whole) // 2]):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(GgufError, match=r"bad.gguf: is no whole GGUF file: .*download it again"):
            prepare(tmp_path / "bad.gguf", tmp_path / "model")


def test_a_directory_of_somebody_else_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    (other := tmp_path / "mine").mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(GgufError, match="was not made by this command; remove it, or give another --out"):
        prepare(tiny[0], other)
    assert (other / "thesis.txt").read_text() == "years of work"


def test_too_little_room_is_said_before_anything_is_unpacked(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000_000))
    with pytest.raises(GgufError, match=r"needs 0\.1 GB and .* has 0\.1 GB free; make room.*--dtype bfloat16"):
        prepare(tiny[0], tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_dtype_without_a_file_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["model", "--dtype", "bfloat16"]) == 1
    assert "--dtype bfloat16 without --gguf" in capsys.readouterr().err
