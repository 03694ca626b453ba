"""Retractions: the same answers, and every slot comes back.

SGLANG_TEST_RETRACT retracts running requests every few steps, on top of a pool too small for all of them. Strict
accounting runs in every step: whatever is not accounted for stops the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS, SCHEDULE
from tests.engine_server import Server, server
from tests.in_flight import Sent, wait_for
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
def retracting(prunes: int, tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    schedule = SCHEDULE if prunes == 2 else ()
    flags = (*CLAA_FLAGS, *schedule, *TINY_FLAGS, "--chunked-prefill-size", "128", "--max-total-tokens", str(POOL))
    env = {**STRICT, **ONE_THREAD, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "4"}
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
    retracting: Server, reference: ReferenceModel
) -> None:
    for _ in range(2):  # cold, and with what the first time left in the cache
        check_all(retracting, reference)
    assert retracting.log().count("Testing retraction") > 10
    check_idle(retracting)


def test_aborts_of_retracted_requests_leave_nothing(retracting: Server, reference: ReferenceModel) -> None:
    """They wait with the positions they kept and the tokens they generated, and hold nothing already."""
    mark = len(retracting.log())
    endless = [
        Ask(PREFIX + tiny_models.prompt(100 + i, seed=100 + i), None if i % 3 == 2 else 0.3, 900) for i in range(8)
    ]
    sent = [Sent(retracting, asked, f"endless-{i}") for i, asked in enumerate(endless)]
    wait_for(lambda: retracting.log()[mark:].count("Testing retraction") > 3, "requests were retracted")
    for index in (0, 7, 3, 2):
        retracting.post("/abort_request", {"rid": sent[index].rid})
    retracting.post("/abort_request", {"abort_all": True})
    for one in sent:
        status, body = one.answer()
        assert status == 200 and body["meta_info"]["finish_reason"]["type"] == "abort", body
    check_idle(retracting)
    check_all(retracting, reference)
