"""Pages larger than a token: the reference's answers, hits that end with a page, and every page comes back.

Pages of 16 tokens with one prune, of 64 with two, whose late rows have pages of their own; there prefill chunks and
generated tokens share steps too (`--enable-mixed-chunk`). SGLang's checks of every step are on, and requests are
retracted every few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.traffic import RETRACT, retractions
from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Answer, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS, SCHEDULE
from tests.engine_server import Server, server
from tests.in_flight import Sent, wait_for
from tests.reference_model import Expected, ReferenceModel
from tests.tiny_models import VOCAB_SIZE
from tests.ways_out import held

pytestmark = pytest.mark.engine

PAGE = {1: 16, 2: 64}  # by how often the server prunes
WINDOW = 32
STEP = 64  # tokens of a step of finishing: the first one of a prefix may be a single page
FLAGS = (
    *(*CLAA_FLAGS, "--claa-finish", "idle", "--claa-finish-chunk", str(STEP), *TINY_FLAGS),
    *("--chunked-prefill-size", "256", "--max-total-tokens", "6400"),
)
STAY = {"finish": False}  # no prefix of it is finished meanwhile


@pytest.fixture(scope="module")
def paged(prunes: int, tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    more = (*SCHEDULE, "--enable-mixed-chunk") if prunes == 2 else ()
    flags = (*FLAGS, *more, "--page-size", str(PAGE[prunes]))
    with server(tiny_model("llama"), *flags, env={**STRICT, **ONE_THREAD, **RETRACT}) as running:
        yield running


def expected(reference: ReferenceModel, asked: Ask, answer: Answer) -> Expected:
    if asked.keep is None:
        return reference.dense(asked.prompt, answer.tokens)
    return reference.pruned(asked.prompt, answer.tokens, asked.keep)


def stats(running: Server) -> dict[str, Any]:
    return running.get("/server_info").json()["claa"]["finishing"]


@pytest.mark.parametrize(("length", "keep"), [(97, 0.5), (1024, 0.3), (1025, 0.3), (1500, 0.9)], ids=str)
def test_cold_and_over_a_hit(length: int, keep: float, paged: Server, prunes: int, reference: ReferenceModel) -> None:
    """The last keeps more than a chunk: its late prefill takes several steps, and its last page is computed again."""
    paged.flush()
    asked = Ask(tiny_models.prompt(length, seed=length), keep, new=24, options=STAY)
    cold = ask(paged, asked)
    check(cold, expected(reference, asked, cold))
    warm = ask(paged, asked)
    assert (cold.cached, warm.cached) == (0, (length - WINDOW) // PAGE[prunes] * PAGE[prunes])
    assert (warm.kept_by_step, warm.tokens) == (cold.kept_by_step, cold.tokens)
    check_idle(paged)


def test_together_with_dense_requests_and_retracted(paged: Server, reference: ReferenceModel) -> None:
    """Twice: over an empty cache, and over what the first time left there."""
    shared, mark = tiny_models.prompt(300, seed=90), len(paged.log())
    asked = [
        Ask(shared + tiny_models.prompt(50, seed=91), 0.2, new=40, options=STAY),
        Ask(shared + tiny_models.prompt(30, seed=92), 0.6, new=60, options=STAY),
        Ask(tiny_models.prompt(500, seed=93), 0.3, new=30, options=STAY),
        Ask(tiny_models.prompt(200, seed=94), None, new=50),
        Ask(tiny_models.prompt(900, seed=95), 0.9, new=25, options=STAY),
        Ask(shared + tiny_models.prompt(80, seed=96), None, new=20),
        Ask(tiny_models.prompt(90, seed=97), 0.1, new=70, options=STAY),
        Ask(tiny_models.prompt(600, seed=98), 1.0, new=35, options=STAY),
    ]
    for _ in range(2):
        for one, answer in zip(asked, ask_together(paged, asked), strict=True):
            check(answer, expected(reference, one, answer))
    assert retractions(paged.log()[mark:])["forced"] > 0
    check_idle(paged)


def test_a_finished_prefix_is_dense_to_its_last_page(paged: Server, prunes: int, reference: ReferenceModel) -> None:
    paged.flush()
    before = stats(paged)
    first = ask(paged, Ask(tiny_models.prompt(700, seed=8), keep=0.2, new=12))
    assert first.report["pruned"] is True
    wait_for(lambda: stats(paged)["finished"] > before["finished"], "the prefix is finished")
    history = tiny_models.prompt(700, seed=8) + first.tokens
    follow = Ask(history + tiny_models.prompt(40, seed=9), keep=0.2, new=12)
    answer = ask(paged, follow, VOCAB_SIZE)
    assert answer.report["pruned"] is False
    # The last token of an answer is not cached.
    assert answer.cached == (len(history) - 1) // PAGE[prunes] * PAGE[prunes]
    check(answer, reference.dense(follow.prompt, answer.tokens))
    check_idle(paged)


def test_aborted_anywhere_they_leave_nothing(paged: Server) -> None:
    paged.flush()
    asked = [Ask(tiny_models.prompt(400 + 90 * i, seed=120 + i), (0.3, 0.9, None)[i % 3], 900) for i in range(8)]
    sent = [Sent(paged, one, f"leaves-{i}") for i, one in enumerate(asked)]
    wait_for(lambda: held(paged) > 0, "some are pruned and run")
    for one in sent[::2]:
        paged.post("/abort_request", {"rid": one.rid})
    paged.post("/abort_request", {"abort_all": True})
    for one in sent:
        status, body = one.answer()
        assert status == 200 and body["meta_info"]["finish_reason"]["type"] == "abort", body
    check_idle(paged)
