"""What fits runs, what fits only dense runs dense and says so, what can never fit is refused at once with its need."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS
from tests.engine_server import Server, server
from tests.reference_model import ReferenceModel

pytestmark = pytest.mark.engine

POOL = 3000  # slots
PROMPT = tiny_models.prompt(1600, seed=120)


@pytest.fixture(scope="module")
def running(tiny_model: Callable[[str], object]) -> Iterator[Server]:
    flags = (*CLAA_FLAGS, *TINY_FLAGS, "--chunked-prefill-size", "256", "--max-total-tokens", str(POOL))
    with server(tiny_model("llama"), *flags, env=STRICT | ONE_THREAD) as started:
        yield started


def test_an_output_that_fits_twice_is_pruned(running: Server, llama_reference: ReferenceModel) -> None:
    """1600 + 640 kept + 2 * 300 output slots of 3000, after a prefix that somebody else left in the cache."""
    ask(running, Ask(tiny_models.prompt(2000, seed=121), new=4))
    answer = ask(running, Ask(PROMPT, keep=0.4, new=300))
    assert answer.report["pruned"] and len(answer.tokens) == 300
    check(answer, llama_reference.pruned(PROMPT, answer.tokens, 0.4))
    check_idle(running)


def test_an_output_that_fits_only_dense_is_not_cut(running: Server, llama_reference: ReferenceModel) -> None:
    """1600 + 1280 kept leave room for 56 tokens; dense, there is room for 500."""
    answer = ask(running, Ask(PROMPT, keep=0.8, new=500))
    assert len(answer.tokens) == 500
    assert answer.report["reason"] == f"needs {1600 + 1280 + 2 * 500} early and late KV slots of a pool of {POOL}"
    check(answer, llama_reference.dense(PROMPT, answer.tokens))
    check_idle(running)


def test_an_output_of_no_given_length_takes_what_fits(running: Server, llama_reference: ReferenceModel) -> None:
    params = {**Ask(PROMPT, keep=0.8).params(), "max_new_tokens": None}
    body = running.generate(input_ids=PROMPT, sampling_params=params)
    assert body["meta_info"]["claa"]["pruned"] and len(body["output_ids"]) == (POOL - 1600 - 1280 - 8) // 2
    expected = llama_reference.pruned(PROMPT, body["output_ids"], 0.8)
    assert body["output_ids"] == expected.tokens
    check_idle(running)


def test_a_prompt_that_fits_only_dense_runs_dense(running: Server, llama_reference: ReferenceModel) -> None:
    prompt = tiny_models.prompt(2500, seed=122)
    answer = ask(running, Ask(prompt, keep=0.9, new=8))
    assert answer.report["reason"] == f"needs {2500 + 2250} early and late KV slots of a pool of {POOL}"
    check(answer, llama_reference.dense(prompt, answer.tokens))
    check_idle(running)


@pytest.mark.parametrize("keep", [0.2, None], ids=["pruned", "dense"])
def test_a_prompt_that_can_never_fit_is_refused_with_its_need(keep: float | None, running: Server) -> None:
    """By stock's own check, which comes first: the pool, less what stock keeps free."""
    body = {"input_ids": tiny_models.prompt(3100, seed=123), "sampling_params": Ask([], keep, 4).params()}
    refused = running.post("/generate", body)
    assert refused.status_code == 400, refused.text
    assert "3100 tokens" in refused.text and f"{POOL - 6} tokens" in refused.text, refused.text
    check_idle(running)


def test_more_than_fits_at_once_waits_its_turn(running: Server, llama_reference: ReferenceModel) -> None:
    """Six requests of which the pool holds two at a time."""
    asked = [Ask(tiny_models.prompt(700 + 30 * i, seed=130 + i), 0.6 if i % 3 else None, new=60) for i in range(6)]
    for one, answer in zip(asked, ask_together(running, asked), strict=True):
        if one.keep is None:
            check(answer, llama_reference.dense(one.prompt, answer.tokens))
        else:
            check(answer, llama_reference.pruned(one.prompt, answer.tokens, one.keep))
    check_idle(running)
