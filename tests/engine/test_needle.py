"""A real model finds a needle in ordinary prose after most of the prompt was dropped, with the profile that the server
finds for it.

What dense finds, pruned must find: a failure of the model is no failure of the prune.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eval_quality
from claa_sglang.tasks.generate import generate
from claa_sglang.tasks.record import save
from tests import haystack
from tests.answers import ONE_THREAD
from tests.engine_server import Server, server

pytestmark = pytest.mark.engine

MODEL = "smollm2"
KEEP_RATE = 0.3
SENTENCES = 103  # about 1,500 tokens with the question
# One depth each, from the beginning to the end of the text; seeds choose the prose, the names and the numbers.
DEPTHS = (0.04, 0.27, 0.5, 0.73, 0.95)
# Seeds of texts with two needles where dense answers both questions; on three of the first five, from 100, it mixes
# them up.
TWO_NEEDLES = (101, 104)


@pytest.fixture(scope="module")
def served(small_model_path: Path) -> Iterator[Server]:
    flags = ("--enable-claa", "--claa-policy", "always", "--claa-finish", "off", "--served-model-name", MODEL)
    flags += ("--claa-min-prompt-tokens", "512", "--enable-cache-report")
    with server(small_model_path, *flags, env=ONE_THREAD) as running:
        yield running


def ask(served: Server, chat: list[dict[str, str]], claa: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """The answer, and what CLAA reports."""
    body = {"model": MODEL, "messages": chat, "temperature": 0, "max_tokens": 28}
    if claa is not None:
        body["custom_params"] = {"claa": claa}
    answer = served.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"], answer.json()["metadata"]["claa"]


def hidden(seed: int, depths: list[float]) -> tuple[str, dict[str, int]]:
    """Prose with one needle per depth, and the number under each name."""
    rng = random.Random(seed)
    numbers = {name: rng.randint(100_000, 999_999) for name in rng.sample(haystack.NAMES, len(depths))}
    return haystack.hide(haystack.prose(SENTENCES, seed), numbers, depths), numbers


def test_pruned_finds_the_needle_wherever_dense_does(served: Server) -> None:
    found, lost = 0, []
    for seed, depth in enumerate(DEPTHS):
        text, numbers = hidden(seed, [depth])
        ((name, number),) = numbers.items()
        dense, report = ask(served, haystack.messages(text, name), {"enabled": False})
        assert not report["pruned"] and 1300 < report["prompt_tokens"] < 1700
        if str(number) not in dense:
            continue
        found += 1
        pruned, report = ask(served, haystack.messages(text, name))
        assert report["pruned"] and report["keep_rate"] == KEEP_RATE
        assert report["kept_tokens"] == int(KEEP_RATE * report["prompt_tokens"])
        if str(number) not in pruned:
            lost.append(f"depth {depth}: {name} is {number}, pruned says {pruned!r}, dense {dense!r}")
    assert found >= len(DEPTHS) - 1, f"dense found {found} of {len(DEPTHS)}: this test shows nothing"
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize("seed", TWO_NEEDLES)
def test_a_follow_up_ranks_the_same_text_afresh(served: Server, seed: int) -> None:
    """The second question is about a needle that the first had no reason to keep."""
    text, numbers = hidden(seed, [0.3, 0.7])
    first, second = numbers
    answers: dict[bool, str] = {}
    for pruned in (False, True):
        answers[pruned], report = ask(served, haystack.messages(text, first), {"enabled": pruned})
        assert report["pruned"] == pruned and report["early_cached_tokens"] < 100, "the text was in the cache"
        assert str(numbers[first]) in answers[pruned], f"pruned {pruned}: {answers[pruned]!r}"
    for pruned in (False, True):
        chat = haystack.messages(text, first, second, answers=(answers[pruned],))
        followed, report = ask(served, chat, {"enabled": pruned})
        assert report["pruned"] == pruned and report["early_cached_tokens"] > 1000
        assert str(numbers[second]) in followed, f"pruned {pruned}: {followed!r}"


def test_the_quality_benchmark_runs_against_a_server(served: Server, small_model_path: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, prompts, out = AutoTokenizer.from_pretrained(small_model_path), tmp_path / "p.jsonl", tmp_path / "q.json"
    save(generate(tokenizer, ["needle-number"], [640], ["repeated"], count=2), prompts)
    asked = [str(prompts), "--url", served.url, "--keep-rates", str(KEEP_RATE), "--kl-prompts", "1", "--in-flight", "4"]
    assert eval_quality.main([*asked, "--out", str(out)]) == 0
    dense, pruned = (c for c in json.loads(out.read_text())["cells"] if (c["task"], c["source"]) == ("all", "all"))
    assert dense["n"] == pruned["n"] == 2 and dense["accuracy"][0] == 1
    assert pruned["to_dense"]["first_token_n"] == 1
    answers = [json.loads(line) for line in out.with_suffix(".answers.jsonl").read_text().splitlines()[1:]]
    assert sorted(a["kept"] / a["tokens"] for a in answers) == pytest.approx([KEEP_RATE] * 2 + [1, 1], abs=0.01)
