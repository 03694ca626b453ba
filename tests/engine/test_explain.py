"""Reports that explain themselves: right scores, whatever is cached and beside them, and answers as without."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.answers import Answer, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import SHARED_CHUNK
from tests.engine_server import Server
from tests.explained import check_explained, follows
from tests.reference_model import ReferenceModel

pytestmark = pytest.mark.engine

KEEP = 0.3
EXPLAIN = {"explain": True}
TARGET = Ask(tiny_models.prompt(600, seed=90), keep=KEEP, new=4)


def explained(asked: Ask, **more: Any) -> Ask:
    return replace(asked, options={**asked.options, **EXPLAIN, **more})


def right(asked: Ask, answer: Answer, reference: ReferenceModel) -> None:
    assert asked.keep is not None
    looking = asked.options.get("explain_window", 0)
    expected = reference.pruned(asked.prompt, answer.tokens, asked.keep, looking=looking)
    check(answer, expected)
    check_explained(answer.report, expected)
    assert ("looked_at" in answer.report["explain"]) == bool(looking)
    if looking:
        found = answer.report["explain"]["looked_at"]
        assert found["window"] == looking and list(found["layers"]) == list(map(str, expected.looked_at))
        for layer, values in expected.looked_at.items():
            assert torch.tensor(found["layers"][str(layer)]).double().allclose(values, rtol=2e-3, atol=1e-6)


def test_scores_are_the_reference_s_and_the_answer_is_the_same(
    llama_server: Server, llama_reference: ReferenceModel
) -> None:
    """Cold in three chunks, over hits that leave the window or more to compute, and with a window of its own."""
    llama_server.flush()
    plain = ask(llama_server, TARGET)
    assert "explain" not in plain.report
    first: dict[str, Any] = {}
    for flush, more in ((True, {}), (False, {}), (True, {"explain_window": 7}), (False, {"explain_window": 200})):
        if flush:
            llama_server.flush()
        asked = explained(TARGET, **more)
        answer = ask(llama_server, asked)
        right(asked, answer, llama_reference)
        assert (answer.tokens, answer.kept) == (plain.tokens, plain.kept)
        assert answer.cached == (0 if flush else 600 - max(32, more.get("explain_window", 0)))
        first = first or answer.report["explain"]
        assert answer.report["explain"]["steps"][0]["scores"] == pytest.approx(first["steps"][0]["scores"], 2e-3)
    check_idle(llama_server)


def test_last_chunks_as_long_as_the_explained_window(llama_server: Server, llama_reference: ReferenceModel) -> None:
    llama_server.flush()
    for length in (SHARED_CHUNK + 1, SHARED_CHUNK + 130, 2 * SHARED_CHUNK + 90):
        asked = explained(Ask(tiny_models.prompt(length, seed=length), keep=KEEP, new=2), explain_window=SHARED_CHUNK)
        right(asked, ask(llama_server, asked), llama_reference)


def test_in_a_batch(llama_server: Server, llama_reference: ReferenceModel) -> None:
    """Beside requests that do not ask, dense ones, and ones whose window is another."""
    llama_server.flush()
    asked = [Ask(tiny_models.prompt(90 + 20 * n, seed=900 + n), keep=None if n == 2 else KEEP, new=3) for n in range(6)]
    asked[1], asked[2], asked[4] = explained(asked[1]), explained(asked[2]), explained(asked[4], explain_window=60)
    answers = ask_together(llama_server, asked)
    for number in (1, 4):
        right(asked[number], answers[number], llama_reference)
    assert answers[2].report["explain"] == {"none": "the request ran dense, see reason"}
    for number in (0, 3, 5):
        assert "explain" not in answers[number].report
    plain = ask_together(llama_server, [replace(one, options={}) for one in asked])
    assert [answer.tokens for answer in plain] == [answer.tokens for answer in answers]


def test_what_was_not_ranked_says_why(llama_server: Server) -> None:
    prompt = tiny_models.prompt(100, seed=91)
    whole = ask(llama_server, explained(Ask(prompt, keep=1.0, new=2)))
    assert whole.report["pruned"] and "every token is kept" in whole.report["explain"]["none"]
    given = llama_server.generate(
        input_ids=prompt, sampling_params={"custom_params": {"claa": {"keep": [3, 4], "explain": True}}}
    )["meta_info"]["claa"]
    assert "gave the positions" in given["explain"]["none"] and given["kept"][:3] == [0, 3, 4]


@pytest.mark.parametrize("ranker", ["claa:paper", "fastkv", "gemfilter", "last-query", "uniform", "claa:heads=sum"])
def test_every_ranker_is_explained(llama_server: Server, ranker: str) -> None:
    asked = {"keep_rate": KEEP, "ranker": ranker, "explain": True}
    prompt = tiny_models.prompt(150, seed=92)
    report = llama_server.generate(
        input_ids=prompt, sampling_params={"max_new_tokens": 1, "custom_params": {"claa": asked}}
    )["meta_info"]["claa"]
    (step,) = report["explain"]["steps"]
    assert list(step["layers"]) == ([] if ranker == "uniform" else ["0", "1", "2", "3"])
    follows(report["kept"], list(range(118)), step["scores"], list(range(118, 150)))
    if ranker in ("fastkv", "gemfilter"):  # the last scored layer decides
        assert step["scores"] == step["layers"]["3"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"explain": True, "explain_window": 100}, "100 tokens leave nothing to look at in a prompt of 100"),
        ({"explain": True, "explain_window": 0}, "explain_window: .*1 to 1024"),
        ({"explain_window": 5}, "add explain"),
        ({"explain": 1}, "explain: .*true or false"),
    ],
    ids=str,
)
def test_what_cannot_be_explained_is_http_400(llama_server: Server, options: dict[str, Any], says: str) -> None:
    refused(llama_server, 100, options, says)


def test_a_window_longer_than_a_chunk_is_http_400(llama_server: Server) -> None:
    options = {"explain": True, "explain_window": SHARED_CHUNK + 1}
    refused(llama_server, 600, options, f"give at most {SHARED_CHUNK}")


def refused(server: Server, tokens: int, options: dict[str, Any], says: str) -> None:
    params = {"max_new_tokens": 1, "custom_params": {"claa": options}}
    answer = server.post("/generate", {"input_ids": tiny_models.prompt(tokens, seed=93), "sampling_params": params})
    assert answer.status_code == 400 and re.search(says, answer.text), answer.text
