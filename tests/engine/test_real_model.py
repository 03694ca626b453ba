"""Cache invariance with a real model and real prose: SmolLM2 in float32, with the profile that its server finds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.answers import ONE_THREAD, STRICT, Answer, Ask, ask, ask_together, check, check_idle
from tests.engine_server import Server, server
from tests.reference_model import Expected, ReferenceModel

pytestmark = pytest.mark.engine

PROFILE = Path(__file__).resolve().parents[2] / "claa_sglang/profiles/smollm2-135m-instruct.json"
TEXT = Path(__file__).parents[1] / "prose.txt"
QUESTIONS = ("\n\nIn one sentence, this text is about", "\n\nThe first person in the text that has a name is")


@pytest.fixture(scope="module")
def reference(small_model_path: Path) -> ReferenceModel:
    profile = json.loads(PROFILE.read_text())
    assert profile["ranker"] in ("claa", "claa:paper"), "the reference has these two rules"
    (step,) = profile["steps"]
    ranks = {"window": profile.get("window", 32), "pool_kernel": profile.get("pool_kernel", 7)}
    where = {"prune_layer": step["prune_layer"], "score_layers": step["score_layers"]}
    return ReferenceModel(small_model_path, **where, **ranks, paper=profile["ranker"] == "claa:paper")


@pytest.fixture(scope="module")
def prompts(small_model_path: Path) -> list[list[int]]:
    """Two questions about 1,200 tokens of prose, and its second part alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model_path)
    text = tokenizer(TEXT.read_text()).input_ids
    return [text[:1200] + tokenizer(q).input_ids for q in QUESTIONS] + [text[1200:1700]]


@pytest.fixture(scope="module")
def served(small_model_path: Path) -> Iterator[Server]:
    flags = (
        "--enable-claa",
        "--claa-policy",
        "always",
        "--claa-finish",
        "off",
        "--claa-min-prompt-tokens",
        "64",
        "--sleep-on-idle",
    )
    # Chunks of 64 tokens and none are test_cache_invariance's, on a model that is fast.
    with server(small_model_path, *flags, "--chunked-prefill-size", "256", env=STRICT | ONE_THREAD) as running:
        yield running


_known: dict[str, Expected] = {}


def check_target(reference: ReferenceModel, asked: Ask, answer: Answer) -> None:
    """Hold an answer against the reference, computed once: all servers must give the same tokens."""
    key = str((hash(tuple(asked.prompt)), asked.keep, answer.tokens))
    if key not in _known:
        assert asked.keep is not None
        _known[key] = reference.pruned(asked.prompt, answer.tokens, asked.keep)
    check(answer, _known[key], tolerance=1e-3)


def test_it_found_its_profile_and_these_are_the_weights_of_it(served: Server) -> None:
    config = served.get("/server_info").json()["claa"]["config"]
    assert config["profile"] == str(PROFILE) and config["profile_origin"] == "auto: shipped with claa-sglang"
    log = served.log()
    assert log.count(f"profile {PROFILE} (auto: shipped with claa-sglang): measured on these weights") == 1
    assert "other weights" not in log and "answers can suffer" not in log


def test_cold_warm_and_another_question(served: Server, reference: ReferenceModel, prompts: list[list[int]]) -> None:
    first, second = Ask(prompts[0], keep=0.3, new=10), Ask(prompts[1], keep=0.3, new=10)
    cold, warm = ask(served, first), ask(served, first)
    assert cold.cached == 0 and warm.cached == len(first.prompt) - 8
    other = ask(served, second)
    assert other.cached >= 1200 and other.kept != cold.kept
    for asked, answer in ((first, cold), (first, warm), (second, other)):
        check_target(reference, asked, answer)


def test_in_a_batch_of_eight(served: Server, reference: ReferenceModel, prompts: list[list[int]]) -> None:
    served.flush()
    target, part = Ask(prompts[0], keep=0.3, new=10), prompts[2]
    company = [
        Ask(part, keep=0.1, new=12),
        Ask(part[:300], new=5),
        Ask(part[100:400], keep=0.6, new=8),
        Ask(part[:20], keep=0.5, new=16),
        Ask(prompts[1][:400], keep=0.4, new=6),
        Ask(part[200:], new=7),
        Ask(part[:70], keep=1.0, new=9),
    ]
    answers = ask_together(served, [*company[:4], target, *company[4:]])
    check_target(reference, target, answers[4])
    check_target(reference, company[0], answers[0])


def test_nothing_is_left(served: Server) -> None:
    check_idle(served)
