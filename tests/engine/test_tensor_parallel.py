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

from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS
from tests.engine.test_cache_invariance import COMPANY, TARGET, expected
from tests.engine_server import Server, second_plugin, server
from tests.in_flight import batches, wait_for
from tests.reference_model import ReferenceModel
from tests.ways_out import held

pytestmark = pytest.mark.engine

TWO_RANKS = {
    "SGLANG_NCCL_SO_PATH": "/nowhere/libnccl.so",
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "TORCH_COMPILE_DISABLE": "1",  # of a mask for the vocabulary, which takes twenty seconds
}
STEP = 64  # tokens of a step of finishing
QUICK = ("--watchdog-timeout", "60")  # seconds, after which ranks that wait for each other are found
FLAGS = ("--tp-size", "2", *CLAA_FLAGS, "--claa-finish", "idle", "--claa-finish-chunk", str(STEP), *TINY_FLAGS)
PLUGIN = """
import functools, os, pathlib

import torch


def register():
    from claa_sglang.forward import late_pass
    from claa_sglang.memory import boundary
    from claa_sglang.patches import policy
    from claa_sglang.ranking import rankers
    from sglang.srt.runtime_context import get_parallel

    def is_on(name):
        on = pathlib.Path(os.environ["CLAA_TEST_FAULT"]).read_text().split(",")
        return on[0] == name and on[1] == str(get_parallel().tp_rank)

    def faulty(name, owner, attribute, applies=lambda *args: True):
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            if is_on(name) and applies(*args):
                raise RuntimeError("planted " + name)
            return original(*args, **kwargs)

        setattr(owner, attribute, wrapped)

    has_pruned = lambda late, *args: bool(late.plan.levels[1]) and any(s.state for s in late.plan.levels[1])
    faulty("scoring", rankers.Claa, "score_layer")
    faulty("storing", boundary.BoundaryStore, "store")
    faulty("late pass", late_pass.LatePass, "cross", lambda late, *a: has_pruned(late) and not late.plan.decode)
    faulty("decoding", late_pass.LatePass, "cross", lambda late, *a: has_pruned(late) and late.plan.decode)
    ranked = late_pass.LatePass._ranking
    late_pass.LatePass._ranking = lambda *a: ranked(*a).roll(7) if is_on("another ranking") else ranked(*a)
    measured = policy.measure  # ranks that measure opposite machines would choose opposite ways
    policy.measure = lambda **k: opposite(measured(**k))

    def opposite(constants):
        return constants._replace(per_pair=constants.per_pair * (1000.0 if get_parallel().tp_rank else 0.001))
"""
ENDED = {
    "scoring": "scoring its prompt",
    "storing": "running its late layers",
    "late pass": "running its late layers",
    "decoding": "running its late layers",
    "another ranking": "running its late layers: RanksDiffer: tensor-parallel ranks did not keep the same tokens",
}


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that names what fails, and on which rank."""
    file = tmp_path_factory.mktemp("fault") / "name"
    file.write_text("nothing,0")
    return file


@pytest.fixture(scope="module")
def running(
    fault: Path, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    plugin = second_plugin(tmp_path_factory.mktemp("plugin"), "claa_test_rank", PLUGIN)
    env = {**plugin, **TWO_RANKS, "CLAA_TEST_FAULT": str(fault), **STRICT, **ONE_THREAD}
    with server(
        tiny_model("llama"), *FLAGS, "--chunked-prefill-size", "256", "--decode-log-interval", "1", env=env
    ) as two:
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
    for one, answer in zip(asked, ask_together(running, asked), strict=True):
        check(answer, expected(llama_reference, one, answer))
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
    mark = len(running.log())
    with ThreadPoolExecutor(1) as beside:
        other = beside.submit(ask, running, dense)
        wait_for(lambda: any(not batch.prefill for batch in batches(running, mark)), "the dense one decodes")
        fault.write_text(f"{name},{rank}")
        try:
            failed = running.post("/generate", body)
        finally:
            fault.write_text("nothing,0")
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


def test_requests_that_hang_up_or_are_retracted(running: Server, llama_reference: ReferenceModel) -> None:
    """Each rank ends them in the same step."""
    running.flush()
    asked = [
        Ask(tiny_models.prompt(200 + 97 * i, seed=40 + i), keep=(0.2, None, 0.6)[i % 3], new=24) for i in range(12)
    ]
    with ThreadPoolExecutor(2) as beside:
        leaving = beside.submit(hang_up, running, tiny_models.prompt(1900, seed=60))
        for one, answer in zip(asked, ask_together(running, asked), strict=True):
            check(answer, expected(llama_reference, one, answer))
        leaving.result()
    wait_for(lambda: held(running) == 0, "nobody is left")
    check_idle(running)


def hang_up(running: Server, prompt: list[int]) -> None:
    """Send a request, and leave while it generates."""
    params = {"max_new_tokens": 500, "ignore_eos": True, "custom_params": {"claa": {"keep_rate": 0.3}}}
    with pytest.raises(requests.RequestException):
        requests.post(running.url + "/generate", json={"input_ids": prompt, "sampling_params": params}, timeout=3)
