"""A failure in one request's own computation ends that request with an error; its batch and the server go on.

Faults are brought in by a second SGLang plugin, installed for the test on PYTHONPATH, that makes one of our functions
raise while a file names it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests import planted
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, check_idle
from tests.engine_server import Server, second_plugin, server
from tests.planted import IN_A_FORWARD
from tests.tiny_models import prompt

pytestmark = pytest.mark.engine

FAULTY_PLUGIN = """
def register():
    from claa_sglang.requests import report
    from tests import planted

    planted.in_a_forward()
    planted.plant("report", report, "build_report")
"""
LONG = prompt(200, seed=1)
# With chunks of 64: a late prefill in one step; and in two, whose request is still the chunked one when it fails.
KEEP = pytest.mark.parametrize("keep", [0.2, 0.6], ids=["one-part", "two-parts"])


@pytest.fixture(scope="module")
def faulty_server(
    fault: Path, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    plugin = second_plugin(tmp_path_factory.mktemp("faulty-plugin"), "claa_test_faulty", FAULTY_PLUGIN)
    env = {**plugin, planted.FILE: str(fault), **STRICT, **ONE_THREAD}
    flags = (
        "--enable-claa",
        "--claa-policy",
        "always",
        "--claa-min-prompt-tokens",
        "100",
        "--chunked-prefill-size",
        "64",
    )
    with server(tiny_model("llama"), *flags, *TINY_FLAGS, env=env) as running:
        yield running


def body(keep: float | None, after: list[int] | None = None) -> dict:
    """A request for LONG, and what comes after it; `keep` None: opted out."""
    claa = {"enabled": False} if keep is None else {"keep_rate": keep}
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True, "custom_params": {"claa": claa}}
    return {"input_ids": LONG + (after or []), "sampling_params": params}


@pytest.fixture(scope="module")
def healthy(faulty_server: Server) -> dict[float | None, list[int]]:
    """Answers of each kind without any fault."""
    answers = {keep: faulty_server.post("/generate", body(keep)).json() for keep in (0.2, 0.6, None)}
    assert [a["meta_info"]["claa"]["pruned"] for a in answers.values()] == [True, True, False]
    return {keep: answer["output_ids"] for keep, answer in answers.items()}


@KEEP
@pytest.mark.parametrize("name", IN_A_FORWARD)
def test_a_failure_ends_its_request_with_an_error(
    name: str, keep: float, faulty_server: Server, fault: Path, healthy: dict[float | None, list[int]]
) -> None:
    faulty_server.flush()
    fault.write_text(name)
    try:
        failed = faulty_server.post("/generate", body(keep))
        assert failed.status_code == 500, failed.text
        assert f"CLAA failed while {IN_A_FORWARD[name]}: RuntimeError: planted {name}" in failed.text
    finally:
        fault.write_text("")
    # The server lives, nothing is held, and nothing wrong was left in the prefix cache.
    follow = body(keep, after=[*healthy[keep][:3], 5, 6, 7])
    over, again = (faulty_server.post("/generate", one).json()["output_ids"] for one in (follow, body(keep)))
    assert again == healthy[keep]
    check_idle(faulty_server)
    assert over == faulty_server.post("/generate", follow).json()["output_ids"]


@KEEP
@pytest.mark.parametrize("name", [name for name in IN_A_FORWARD if name != "storing one"])  # several decode at a time
def test_dense_requests_of_the_same_batch_are_unharmed(
    name: str, keep: float, faulty_server: Server, fault: Path, healthy: dict[float | None, list[int]]
) -> None:
    faulty_server.flush()
    fault.write_text(name)
    answers: dict[int, requests.Response] = {}

    def ask(index: int) -> None:
        answers[index] = faulty_server.post("/generate", body(None if index % 2 == 0 else keep))

    try:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        fault.write_text("")
    for i in range(6):
        if i % 2 == 0:
            assert answers[i].json()["output_ids"] == healthy[None]
        else:
            assert answers[i].status_code == 500
    # Steps of the dense ones came between a chunk that failed and its end: still, nothing of it is found.
    assert faulty_server.post("/generate", body(keep)).json()["output_ids"] == healthy[keep]
    check_idle(faulty_server)


def test_a_report_that_fails_costs_the_report_alone(
    faulty_server: Server, fault: Path, healthy: dict[float | None, list[int]]
) -> None:
    fault.write_text("report")
    try:
        answer = faulty_server.post("/generate", body(0.2)).json()
    finally:
        fault.write_text("")
    assert answer["output_ids"] == healthy[0.2]
    assert "planted report" in answer["meta_info"]["claa"]["error"]
