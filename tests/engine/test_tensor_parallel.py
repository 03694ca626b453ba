"""Two tensor-parallel ranks on the CPU engine: the reference's answers, and what fails on one rank ends on both.

SGLang's checks of every step are on, with which ranks compare what they kept in every forward. Stock starts two ranks
on a CPU only where its NCCL library is not found (`TWO_RANKS`): with the CUDA build of torch it would make a
communicator of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.traffic import RETRACT, retractions
from tests import planted, tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS
from tests.engine.test_cache_invariance import COMPANY, TARGET, expected
from tests.engine_server import Server, second_plugin, server
from tests.in_flight import Sent, batches, end_of_log, wait_for
from tests.planted import IN_A_FORWARD
from tests.reference_model import ReferenceModel
from tests.scrape import counting
from tests.ways_out import held

pytestmark = pytest.mark.engine

TWO_RANKS = {
    "SGLANG_NCCL_SO_PATH": "/nowhere/libnccl.so",
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "TORCH_COMPILE_DISABLE": "1",  # of a mask for the vocabulary, which takes twenty seconds
}
STEP = 64  # tokens of a step of finishing
FLAGS = (
    *("--tp-size", "2", *CLAA_FLAGS, "--claa-finish", "idle", "--claa-finish-chunk", str(STEP), *TINY_FLAGS),
    *("--chunked-prefill-size", "256", "--decode-log-interval", "1"),
    "--enable-metrics",
    *("--watchdog-timeout", "60"),  # seconds, after which ranks that wait for each other are found
)
# Beside faults: a rank that ranks otherwise; and ranks that measure opposite machines, which would go opposite ways.
PLUGIN = """
def register():
    from claa_sglang.forward.late_pass import LatePass
    from claa_sglang.patches import policy
    from sglang.srt.runtime_context import get_parallel
    from tests import planted

    planted.in_a_forward()
    ranked, measured = LatePass._ranking, policy.measure
    LatePass._ranking = lambda *a: ranked(*a).roll(7) if planted.is_on("another ranking") else ranked(*a)

    def opposite(constants):
        return constants._replace(per_pair=constants.per_pair * (1000.0 if get_parallel().tp_rank else 0.001))

    policy.measure = lambda **k: opposite(measured(**k))
"""
ENDED = {name: IN_A_FORWARD[name] for name in ("scoring", "storing", "late pass", "decoding")} | {
    "another ranking": "running its late layers: RanksDiffer: tensor-parallel ranks did not keep the same tokens",
}


@pytest.fixture(scope="module")
def running(
    fault: Path, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    plugin = second_plugin(tmp_path_factory.mktemp("plugin"), "claa_test_rank", PLUGIN)
    env = {**plugin, **TWO_RANKS, **RETRACT, planted.FILE: str(fault), **STRICT, **ONE_THREAD}
    with server(tiny_model("llama"), *FLAGS, env=env) as two:
        yield two


def stats(running: Server) -> dict[str, Any]:
    return running.get("/server_info").json()["claa"]["finishing"]


def test_cold_and_over_a_hit(running: Server, llama_reference: ReferenceModel) -> None:
    running.flush()
    asked = replace(TARGET, options={"finish": False})
    cold = ask(running, asked)
    check(cold, expected(llama_reference, asked, cold))
    warm = ask(running, asked)
    assert (cold.cached, warm.cached) == (0, 1025 - 32)
    assert (warm.kept, warm.tokens) == (cold.kept, cold.tokens)


def test_in_a_batch_of_eight(running: Server, llama_reference: ReferenceModel) -> None:
    running.flush()
    asked = [TARGET, *COMPANY]
    with counting(running, "sglang:claa_requests_total") as requests:
        for one, answer in zip(asked, ask_together(running, asked), strict=True):
            check(answer, expected(llama_reference, one, answer))
    assert requests == {(): len(asked)}, "once, not on each rank"
    check_idle(running)


@pytest.mark.parametrize("ranker", ["claa:heads=sum", "fastkv", "gemfilter", "last-query", "uniform"])
def test_any_ranker_is_of_all_heads(ranker: str, running: Server) -> None:
    """Ranks compare what they kept in each of these forwards."""
    asked = Ask(tiny_models.prompt(600, seed=5), keep=0.2, options={"ranker": ranker, "finish": False})
    answer = ask(running, asked)
    assert answer.report["pruned"] is True and len(answer.kept or ()) == 120
    assert ask(running, asked).kept == answer.kept


def test_a_finished_prefix_is_dense_on_both_ranks(running: Server, llama_reference: ReferenceModel) -> None:
    running.flush()
    before = stats(running)
    first = ask(running, Ask(tiny_models.prompt(700, seed=8), keep=0.2, new=4))
    assert first.report["pruned"] is True
    wait_for(lambda: stats(running)["finished"] > before["finished"], "the prefix is finished")
    assert stats(running)["steps"] - before["steps"] >= 700 // STEP
    follow = Ask(tiny_models.prompt(700, seed=8) + first.tokens + tiny_models.prompt(40, seed=9), keep=0.2)
    answer = ask(running, follow)
    assert answer.report["pruned"] is False and answer.cached >= 700
    check(answer, llama_reference.dense(follow.prompt, answer.tokens))
    check_idle(running)


def test_ranks_that_measure_different_machines_go_one_way(running: Server) -> None:
    """Else they would compute different things, and wait for each other for ever."""
    running.flush()
    asked = [
        Ask(tiny_models.prompt(length, seed=20 + length), keep=0.2, options={"policy": "auto"})
        for length in (300, 900, 1500, 300, 900, 1500)
    ]
    answers = [ask(running, one) for one in asked]
    together = ask_together(running, asked)
    assert all(len(answer.tokens) == 8 for answer in [*answers, *together])
    check_idle(running)


@pytest.mark.parametrize(("name", "rank"), [*((name, 1) for name in ENDED), ("scoring", 0)])
def test_a_failure_on_one_rank_ends_its_request_on_both(name: str, rank: int, running: Server, fault: Path) -> None:
    running.flush()
    pruned = Ask(tiny_models.prompt(500, seed=30), keep=0.2, options={"finish": False})
    dense = Ask(tiny_models.prompt(500, seed=31), new=40)
    healthy, alone = ask(running, pruned), ask(running, dense)
    running.flush()
    body = {"input_ids": pruned.prompt, "sampling_params": pruned.params()}
    mark = end_of_log(running)
    with ThreadPoolExecutor(1) as beside:
        other = beside.submit(ask, running, dense)
        wait_for(lambda: any(not batch.prefill for batch in batches(running, mark)), "the dense one decodes")
        fault.write_text(f"{name},{rank}")
        try:
            failed = running.post("/generate", body)
        finally:
            fault.write_text("")
        assert failed.status_code == 500, failed.text
        # The first rank answers. It tells its own cause, or where that is.
        elsewhere = rank == 1 and name == "scoring"
        assert f"CLAA failed while {'scoring or ranking its prompt' if elsewhere else ENDED[name]}" in failed.text
        if name != "another ranking":
            assert ("planted " if rank == 0 else "another tensor-parallel rank failed here") in failed.text
        assert other.result().tokens == alone.tokens
    again = ask(running, pruned)
    assert (again.kept, again.tokens) == (healthy.kept, healthy.tokens)
    check_idle(running)


def test_failures_that_a_retraction_overtakes(running: Server, fault: Path) -> None:
    """With overlap, one that failed may be retracted, or its next part be computed, before its result is processed.
    They take 2 to 7 steps, so that a forced retraction soon meets one: it takes whoever has generated least."""
    failing = [
        Ask(tiny_models.prompt(length, seed=30), keep=keep, options={"finish": False})
        for length in (300, 500, 700, 900, 1100, 1300)
        for keep in (0.2, 0.6)
    ]
    running.flush()
    mark, start = end_of_log(running), len(running.log())
    beside = Sent(running, Ask(tiny_models.prompt(50, seed=31), new=1900), "beside")
    wait_for(lambda: any(not batch.prefill for batch in batches(running, mark)), "the dense one decodes")
    fault.write_text("storing,1")
    try:
        for turn in range(5 * len(failing)):
            pruned = failing[turn % len(failing)]
            answer = running.post("/generate", {"input_ids": pruned.prompt, "sampling_params": pruned.params()})
            assert answer.status_code == 500 and f"CLAA failed while {ENDED['storing']}" in answer.text
            if turn >= len(failing) - 1 and retractions(running.log()[start:])["forced"] > 1:
                break
        else:
            raise AssertionError("no retraction came between a failure and its end")
    finally:
        fault.write_text("")
    running.post("/abort_request", {"rid": beside.rid})
    status, body = beside.answer()
    assert status == 200 and body["meta_info"]["finish_reason"]["type"] == "abort"
    check_idle(running)


def test_requests_that_are_retracted_beside_one_that_hangs_up(running: Server, llama_reference: ReferenceModel) -> None:
    """Each rank ends them, and takes them up again, in the same step."""
    running.flush()
    mark = len(running.log())
    asked = [
        Ask(tiny_models.prompt(200 + 97 * i, seed=40 + i), keep=(0.2, None, 0.6)[i % 3], new=24) for i in range(12)
    ]
    with ThreadPoolExecutor(2) as beside:
        leaving = beside.submit(hang_up, running, tiny_models.prompt(1900, seed=60))
        for one, answer in zip(asked, ask_together(running, asked), strict=True):
            check(answer, expected(llama_reference, one, answer))
        leaving.result()
    wait_for(lambda: held(running) == 0, "nobody is left")
    assert retractions(running.log()[mark:])["forced"] > 0
    check_idle(running)


def hang_up(running: Server, prompt: list[int]) -> None:
    """Send a request, and leave while it generates."""
    params = {"max_new_tokens": 500, "ignore_eos": True, "custom_params": {"claa": {"keep_rate": 0.3}}}
    with pytest.raises(requests.RequestException):
        requests.post(running.url + "/generate", json={"input_ids": prompt, "sampling_params": params}, timeout=3)
