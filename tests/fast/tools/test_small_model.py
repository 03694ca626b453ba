"""Preparing the small model: nothing half made is taken for the model, and errors name a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from claa_sglang.tools import gguf_model, small_model


def make_complete(directory: Path) -> None:
    directory.mkdir(parents=True)
    for name in small_model._FILES:
        (directory / name).write_text("{}")
    (directory / "source.json").write_text(json.dumps(small_model._SOURCE))


def test_a_prepared_directory_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_complete(tmp_path / "model")
    monkeypatch.setattr(small_model, "_download", lambda temp: pytest.fail("downloaded again"))
    assert small_model.prepare(tmp_path / "model") == tmp_path / "model"


@pytest.mark.parametrize("missing", [*small_model._FILES, "source.json"])
def test_a_directory_missing_a_file_is_not_prepared(tmp_path: Path, missing: str):
    make_complete(tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    assert not small_model.is_prepared(tmp_path / "model")


def test_a_directory_of_an_older_conversion_is_not_prepared(tmp_path: Path):
    make_complete(tmp_path / "model")
    (tmp_path / "model" / "source.json").write_text(json.dumps({**small_model._SOURCE, "layout": 0}))
    assert not small_model.is_prepared(tmp_path / "model")


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(gguf: Path, out: Path, source: dict) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise small_model.SmallModelError("half way")

    monkeypatch.setattr(small_model, "_download", lambda temp: temp / "x.gguf")
    monkeypatch.setattr(gguf_model, "convert", broken)
    with pytest.raises(small_model.SmallModelError, match="half way"):
        small_model.prepare(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_directory_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale").write_text("")
    (tmp_path / "model" / "source.json").write_text("{}")
    monkeypatch.setattr(small_model, "_download", lambda temp: temp / "x.gguf")
    monkeypatch.setattr(gguf_model, "convert", lambda gguf, out, source: make_complete(out))
    small_model.prepare(tmp_path / "model")
    assert small_model.is_prepared(tmp_path / "model") and not (tmp_path / "model" / "stale").exists()


def test_an_unwritable_place_is_an_error_with_a_remedy(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(gguf_model.GgufError, match="cannot write"):
        small_model.prepare(tmp_path / "file" / "model")


def test_the_model_has_a_chat_template_and_the_declared_shape(small_model_path: Path):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(small_model_path)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    assert (config.model_type, config.num_hidden_layers, heads) == ("llama", 30, (9, 3))
    tokenizer = AutoTokenizer.from_pretrained(small_model_path)
    chat = [{"role": "user", "content": "Say 1234."}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nSay 1234.<|im_end|>\n<|im_start|>assistant\n")
