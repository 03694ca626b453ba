"""`claa-sglang calibrate` as it is run, on a tiny random model: from two files of prompts to a profile of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from claa_sglang import cli
from claa_sglang.config import profile_search
from claa_sglang.config.flags import ClaaFlags, resolve
from claa_sglang.tasks.record import Prompt, save
from tests import byte_tokenizer, tiny_models

NEEDLE = " The code is 4711."


def prompts(source: str, path: Path) -> Path:
    """Eight, of two lengths. One token is one letter; the whole needle counts, as no answer is expected."""
    rng = random.Random(source)

    def letters(count: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(count))

    lengths = [100, 200] * 4
    made = [
        Prompt(
            prompt=letters(30) + NEEDLE + letters(one),
            source=source,
            length=one,
            seed=seed,
            needles=[NEEDLE],
            max_new_tokens=2,
        )
        for seed, one in enumerate(lengths)
    ]
    save(made, path)
    return path


# A random model sees nothing, so next to nothing is asked for.
ASKED = ["--target", "0.1", "--needle-recall", "0", "--whole", "0", "--keep-rates", "0.3", "0.6", "--steps", "2"]
GIVEN = ["--prune-layers", "2", "5", "--rankers", "claa", "claa:paper", "--cost-constants", "0", "1", "0", "0"]


def test_from_prompts_to_a_profile_that_serves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(profile_search.VARIABLE, str(tmp_path / "copies"))
    monkeypatch.setenv("COLUMNS", "200")
    model = byte_tokenizer.add(tiny_models.build("llama", tmp_path), tmp_path)
    files = ["--prompts", prompts("one", tmp_path / "a.jsonl"), "--held-out", prompts("two", tmp_path / "b.jsonl")]
    out, studies = tmp_path / "p.json", tmp_path / "studies"
    arguments = ["calibrate", "--model", model, "--out", out, *files, "--studies", studies, "--prompt-tokens", "1000"]
    command = [*map(str, arguments), *ASKED, *GIVEN, "--device", "cpu"]
    assert cli.main(command) == 0

    said = capsys.readouterr().out
    assert "warning no prompt has an answer of 24 tokens or more" in said
    for words in ("whole answers", "against the default", "one step against two", "carries over"):
        assert words in said
    profile = json.loads(out.read_text())
    config = resolve(ClaaFlags(profile=str(out)), profile["model"]["num_layers"])
    assert config.window == 32 and config.ranker in ("claa", "claa:paper") and 2 <= config.steps[0].prune_layer <= 5
    assert config.min_prompt_tokens == 30 + len(NEEDLE) + 100
    assert "at 100 tokens" in profile["provenance"]["held out: two"]
    assert "whole answers 0" in profile["provenance"]["target"]

    made = {file: file.stat().st_mtime_ns for file in studies.iterdir()}
    assert len(made) == 16 and cli.main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in studies.iterdir()} == made
    assert json.loads(out.read_text()) == profile
