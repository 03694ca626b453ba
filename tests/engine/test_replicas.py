"""Two replicas behind one server (`--dp-size 2`): each answers as one server does, from a cache of its own.

A request names its replica in `routed_dp_rank`; one that does not gets the next in turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_model import VOCAB_SIZE
from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Answer, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS, SHARED_CHUNK
from tests.engine_server import Server, server
from tests.reference_model import ReferenceModel
from tests.scrape import counting, scrape

pytestmark = pytest.mark.engine

REPLICAS = (0, 1)
POOL = 20_000  # tokens of each replica, by CPU_FLAGS
WINDOW = 32
CORES = sorted(os.sched_getaffinity(0))
# SGLang gives each replica a NUMA node of its own, and refuses to start where there are fewer: cores are named here.
BIND = {"SGLANG_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}"}


@pytest.fixture(scope="module")
def replicas(tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    flags = (*CLAA_FLAGS, *TINY_FLAGS, "--chunked-prefill-size", str(SHARED_CHUNK))
    flags += ("--dp-size", str(len(REPLICAS)), "--enable-metrics")
    with server(tiny_model("llama"), *flags, env=STRICT | ONE_THREAD | BIND) as running:
        yield running


def late_slots(running: Server) -> list[dict[str, int]]:
    """Of each replica."""
    return [state["claa"]["late_slots"] for state in running.get("/server_info").json()["internal_states"]]


def check_all(reference: ReferenceModel, asked: list[Ask], answers: list[Answer]) -> None:
    for one, answer in zip(asked, answers, strict=True):
        assert answer.report["pruned"] == (one.keep is not None)
        if one.keep is None:
            check(answer, reference.dense(one.prompt, answer.tokens))
        else:
            check(answer, reference.pruned(one.prompt, answer.tokens, one.keep))


def test_both_report(replicas: Server) -> None:
    """SGLang's own readback has one state per replica, and the server's entry is their sum."""
    found: dict[str, Any] = replicas.get("/server_info").json()["claa"]
    assert found["config"]["policy"] == "always" and found["config"]["finish"] == "off"
    assert found["hooks"]["ok"]
    assert [slots["total"] for slots in late_slots(replicas)] == [POOL, POOL]
    assert found["late_slots"]["total"] == POOL * len(REPLICAS)


def test_each_answers_from_its_own_cache(replicas: Server, llama_reference: ReferenceModel) -> None:
    """What one replica has cached is cold on the other, and a repeated prompt hits where it was before."""
    replicas.flush()
    prompt = tiny_models.prompt(700, seed=81)
    for replica in REPLICAS:
        asked = Ask(prompt, keep=0.2, new=10, extra={"routed_dp_rank": replica})
        cold, warm = (ask(replicas, asked, VOCAB_SIZE) for _ in range(2))
        assert (cold.replica, warm.replica) == (replica, replica)
        assert (cold.cached, warm.cached) == (0, len(prompt) - WINDOW)
        check_all(llama_reference, [asked, asked], [cold, warm])


def test_requests_at_once_land_on_both(replicas: Server, llama_reference: ReferenceModel) -> None:
    """Nobody names a replica; pruned and dense requests of one prefix run side by side on both."""
    replicas.flush()
    shared = tiny_models.prompt(400, seed=82)
    asked = [Ask(shared + tiny_models.prompt(60 + n, seed=830 + n), keep=(0.15, 0.4, None)[n % 3]) for n in range(12)]
    with (
        counting(replicas, "sglang:claa_requests_total", "outcome", "reason") as requests,
        counting(replicas, "sglang:claa_prompt_tokens_total", "part") as tokens,
    ):
        answers = ask_together(replicas, asked)
    assert requests == {("pruned", "asked"): 8, ("dense", "opted_out"): 4}, "each once, whichever replica it was"
    assert tokens["kept",] == sum(answer.report["kept_tokens"] for answer in answers if answer.report["pruned"])
    for keep in (0.15, 0.4, None):
        landed = {answer.replica for one, answer in zip(asked, answers, strict=True) if one.keep == keep}
        assert landed == set(REPLICAS)
    check_all(llama_reference, asked, answers)


def test_nothing_is_left(replicas: Server) -> None:
    for replica in REPLICAS:
        ask(replicas, Ask(tiny_models.prompt(300, seed=84), keep=0.3, extra={"routed_dp_rank": replica}))
    assert all(slots["free"] < POOL for slots in late_slots(replicas))  # each has a prefix in its cache
    check_idle(replicas)
    assert set(scrape(replicas, "sglang:claa_late_slots_held", "dp_rank")) == {("0",), ("1",)}
    assert late_slots(replicas) == [{"total": POOL, "free": POOL, "held": 0}] * len(REPLICAS)
