"""Retractions, aborts and disconnects: the same answers, and every slot comes back.

SGLANG_TEST_RETRACT retracts running requests every few steps, on top of a pool too small for all of them. Strict
accounting runs in every step: whatever is not accounted for stops the server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests import tiny_models
from tests.answers import STRICT, TINY_ENV, TINY_FLAGS, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS
from tests.engine_server import Server, server
from tests.reference_model import ReferenceModel

pytestmark = pytest.mark.engine

POOL = 3000  # slots; the requests below need about twice as many
PREFIX = tiny_models.prompt(300, seed=90)
ASKED = (
    Ask(PREFIX + tiny_models.prompt(50, seed=91), keep=0.2, new=40),
    Ask(PREFIX + tiny_models.prompt(30, seed=92), keep=0.6, new=60),
    Ask(tiny_models.prompt(500, seed=93), keep=0.3, new=30),
    Ask(tiny_models.prompt(200, seed=94), new=50),
    Ask(tiny_models.prompt(700, seed=95), keep=0.9, new=25),
    Ask(PREFIX + tiny_models.prompt(80, seed=96), new=20),
    Ask(tiny_models.prompt(90, seed=97), keep=0.1, new=70),
    Ask(tiny_models.prompt(600, seed=98), keep=1.0, new=35),
)


@pytest.fixture(scope="module")
def retracting(tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    flags = (*CLAA_FLAGS, *TINY_FLAGS, "--chunked-prefill-size", "128", "--max-total-tokens", str(POOL))
    env = {**STRICT, **TINY_ENV, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "4"}
    with server(tiny_model("llama"), *flags, env=env) as running:
        yield running


def check_all(running: Server, reference: ReferenceModel) -> None:
    for one, answer in zip(ASKED, ask_together(running, ASKED), strict=True):
        assert len(answer.tokens) == one.new
        if one.keep is None:
            check(answer, reference.dense(one.prompt, answer.tokens))
        else:
            check(answer, reference.pruned(one.prompt, answer.tokens, one.keep))


def test_retracted_requests_give_the_answers_they_give_undisturbed(
    retracting: Server, llama_reference: ReferenceModel
) -> None:
    for _ in range(2):  # cold, and with what the first time left in the cache
        check_all(retracting, llama_reference)
    assert retracting.log().count("Testing retraction") > 10
    check_idle(retracting)


def long_request(running: Server, index: int, stream: bool = False) -> requests.Response:
    """A request that would run for minutes, pruned or dense, with a shared prefix."""
    asked = Ask(PREFIX + tiny_models.prompt(100 + index, seed=100 + index), None if index % 3 == 2 else 0.3, 900)
    body = {"input_ids": asked.prompt, "sampling_params": asked.params(), "rid": f"long-{index}", "stream": stream}
    return requests.post(f"{running.url}/generate", json=body, stream=stream, timeout=300)


def test_aborts_leave_nothing(retracting: Server, llama_reference: ReferenceModel) -> None:
    """Some while they run, some while they wait, the rest all at once."""
    reasons: dict[int, Any] = {}

    def run(index: int) -> None:
        reasons[index] = long_request(retracting, index).json()["meta_info"]["finish_reason"]["type"]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    for index in (0, 7, 3, 2):
        retracting.post("/abort_request", {"rid": f"long-{index}"})
        time.sleep(0.2)
    retracting.post("/abort_request", {"abort_all": True})
    for thread in threads:
        thread.join()
    assert set(reasons.values()) == {"abort"} and len(reasons) == 8
    check_idle(retracting)
    check_all(retracting, llama_reference)


def test_disconnects_leave_nothing(retracting: Server, llama_reference: ReferenceModel) -> None:
    for index in range(4):
        with long_request(retracting, index, stream=True) as response:
            next(response.iter_lines())
    deadline = time.monotonic() + 60
    while retracting.get("/server_info").json()["claa"]["late_slots"]["held"] and time.monotonic() < deadline:
        time.sleep(0.5)
    check_idle(retracting)
    check_all(retracting, llama_reference)


def test_a_flush_while_requests_run_changes_nothing(retracting: Server, llama_reference: ReferenceModel) -> None:
    """SGLang refuses it, and the requests go on."""
    done = threading.Event()
    codes = []

    def flush() -> None:
        while not done.is_set():
            codes.append(retracting.post("/flush_cache").status_code)
            time.sleep(0.1)

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        check_all(retracting, llama_reference)
    finally:
        done.set()
        thread.join()
    assert len(codes) > 3
    check_idle(retracting)


def test_what_can_never_fit_is_cut_or_refused_and_the_server_lives(
    retracting: Server, llama_reference: ReferenceModel
) -> None:
    """Dense, this prompt fits the pool; with its late slots it does not leave room for the tokens asked for."""
    prompt = tiny_models.prompt(1600, seed=120)
    answer = ask(retracting, Ask(prompt, keep=0.8, new=500))
    assert 0 < len(answer.tokens) < 500
    check(answer, llama_reference.pruned(prompt, answer.tokens, 0.8))
    body = {"input_ids": tiny_models.prompt(2500, seed=121), "sampling_params": Ask([], 0.9, 4).params()}
    retracting.post("/generate", body)  # either way: answered
    check_idle(retracting)
    check_all(retracting, llama_reference)
