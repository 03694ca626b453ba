"""Records on disk: what was saved comes back, and nothing of another model, prompt or choice does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from claa_sglang.offline import oracle, records, study
from claa_sglang.offline.records import RecordError, Subject
from tests import tiny_models


def _about(**changed) -> Subject:
    values = {"kind": "oracle", "model": "m", "fingerprint": "f" * 64, "prompt": "p" * 64, "tokens": 9}
    return Subject(**{**values, "options": {"window": 8}, **changed})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "made" / "record"
    records.save(path, _about(), (3, 1), {"a": torch.arange(6.0).view(2, 3).T})
    answer, tensors = records.load(path, _about(model="the same elsewhere"))
    assert answer == (3, 1) and torch.equal(tensors["a"], torch.arange(6.0).view(2, 3).T)
    assert [file.name for file in path.parent.iterdir()] == ["record"]


@pytest.mark.parametrize(
    "changed",
    [{"kind": "study"}, {"fingerprint": "e" * 64}, {"prompt": "q" * 64}, {"tokens": 10}, {"options": {"window": 4}}],
    ids=lambda changed: next(iter(changed)),
)
def test_another_subject_is_refused(changed: dict, tmp_path: Path) -> None:
    records.save(tmp_path / "record", _about(), (), {})
    with pytest.raises(RecordError, match=f"another {next(iter(changed))}.*give the model"):
        records.load(tmp_path / "record", _about(**changed))
    assert _about(**changed).filename() != _about().filename() or "tokens" in changed  # the prompt decides its length


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b'{"about": 1}'])
def test_a_file_that_is_no_record_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "record").write_bytes(content)
    with pytest.raises(RecordError, match="delete it"):
        records.load(tmp_path / "record", _about())


def test_models_and_prompts_are_told_apart(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    first, second = tiny_models.build("llama", tmp_path), tiny_models.build("llama", tmp_path, seed=1)
    loaded = {
        "one": AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32),
        "again": AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32),
        "other weights": AutoModelForCausalLM.from_pretrained(second, dtype=torch.float32),
        "other dtype": AutoModelForCausalLM.from_pretrained(first, dtype=torch.bfloat16),
        "rounded": AutoModelForCausalLM.from_pretrained(first, dtype=torch.bfloat16).float(),
    }
    prints = {name: records.fingerprint(model) for name, model in loaded.items()}
    assert prints["one"] == prints["again"] and len(set(prints.values())) == 4
    ids = torch.arange(40)
    assert records.prompt_hash(ids) == records.prompt_hash(ids.int())
    assert records.prompt_hash(ids) != records.prompt_hash(ids.flip(0))

    oracle.answer_informed(loaded["one"], ids, max_answer_tokens=2).save(tmp_path / "oracle")
    oracle.load(tmp_path / "oracle", loaded["again"], ids, max_answer_tokens=2)
    for model, prompt, tokens in [("other weights", ids, 2), ("one", ids.flip(0), 2), ("one", ids, 3)]:
        with pytest.raises(RecordError):
            oracle.load(tmp_path / "oracle", loaded[model], prompt, max_answer_tokens=tokens)

    made = study.load_or_study(tmp_path / "studies", loaded["one"], ids, max_answer_tokens=2)
    [file] = (tmp_path / "studies").iterdir()
    written = file.stat().st_mtime_ns
    read = study.load_or_study(tmp_path / "studies", loaded["again"], ids, max_answer_tokens=2)
    assert file.stat().st_mtime_ns == written and read.about == made.about and read.answer == made.answer
    assert read.statistics.keys() == made.statistics.keys()
    assert all(torch.equal(read.statistics[name], made.statistics[name]) for name in made.statistics)
    assert torch.equal(read.oracle, made.oracle)
