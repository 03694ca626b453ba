"""A failure in one request's own computation ends that request with an error; its batch and the server go on.

Faults are brought in by a second SGLang plugin, installed for the test on PYTHONPATH, that makes one of our functions
raise while a file names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.answers import STRICT, TINY_ENV, TINY_FLAGS
from tests.engine_server import Server, second_plugin, server
from tests.tiny_models import prompt

pytestmark = pytest.mark.engine

FAULTY_PLUGIN = """
import functools, os, pathlib


def register():
    from claa_sglang import late_pass, report

    def faulty(name, owner, attribute, applies=lambda *args: True):
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            if pathlib.Path(os.environ["CLAA_TEST_FAULT"]).read_text() == name and applies(*args):
                raise RuntimeError("planted " + name)
            return original(*args, **kwargs)

        setattr(owner, attribute, wrapped)

    has_pruned = lambda late, *args: bool(late.plan.levels[1]) and any(s.state for s in late.plan.levels[1])
    faulty("scoring", late_pass, "window_scores")
    faulty("ranking", late_pass, "rank")
    faulty("late pass", late_pass.LatePass, "cross", lambda late, *a: has_pruned(late) and not late.plan.decode)
    faulty("decoding", late_pass.LatePass, "cross", lambda late, *a: has_pruned(late) and late.plan.decode)
    faulty("report", report, "build_report")
"""
LONG = prompt(200, seed=1)
ENDED = {
    "scoring": "scoring its prompt",
    "ranking": "ranking its prompt",
    "late pass": "running its late layers",
    "decoding": "running its late layers",
}


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that names the function to fail; empty for none."""
    file = tmp_path_factory.mktemp("fault") / "name"
    file.write_text("")
    return file


@pytest.fixture(scope="module")
def faulty_server(
    fault: Path, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    plugin = second_plugin(tmp_path_factory.mktemp("faulty-plugin"), "claa_test_faulty", FAULTY_PLUGIN)
    env = {**plugin, "CLAA_TEST_FAULT": str(fault), **STRICT, **TINY_ENV}
    flags = ("--enable-claa", "--claa-min-prompt-tokens", "100", "--claa-keep-rate", "0.4")
    with server(tiny_model("llama"), *flags, *TINY_FLAGS, env=env) as running:
        yield running


def body(prompts: list[list[int]], *, dense: list[bool], new: int = 6) -> dict:
    params = [
        {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        | ({"custom_params": {"claa": {"enabled": False}}} if opted_out else {})
        for opted_out in dense
    ]
    return {"input_ids": prompts, "sampling_params": params}


@pytest.fixture(scope="module")
def healthy(faulty_server: Server) -> dict[str, list[int]]:
    """Answers of the two kinds without any fault."""
    answers = faulty_server.post("/generate", body([LONG, LONG], dense=[False, True])).json()
    assert [a["meta_info"]["claa"]["pruned"] for a in answers] == [True, False]
    return {"pruned": answers[0]["output_ids"], "dense": answers[1]["output_ids"]}


@pytest.mark.parametrize("name", ENDED)
def test_a_failure_ends_its_request_with_an_error(
    name: str, faulty_server: Server, fault: Path, healthy: dict[str, list[int]]
) -> None:
    faulty_server.flush()
    fault.write_text(name)
    try:
        failed = faulty_server.post("/generate", body([LONG], dense=[False]))
        assert failed.status_code == 500, failed.text
        assert f"CLAA failed while {ENDED[name]}: RuntimeError: planted {name}" in failed.text
    finally:
        fault.write_text("")
    # The server lives, nothing is held, and nothing wrong was left in the prefix cache.
    again = faulty_server.generate(input_ids=LONG, sampling_params={"max_new_tokens": 6, "ignore_eos": True})
    assert again["output_ids"] == healthy["pruned"]
    assert faulty_server.get("/server_info").json()["claa"]["late_slots"]["held"] == 0


@pytest.mark.parametrize("name", ENDED)
def test_dense_requests_of_the_same_batch_are_unharmed(
    name: str, faulty_server: Server, fault: Path, healthy: dict[str, list[int]]
) -> None:
    import threading

    faulty_server.flush()
    fault.write_text(name)
    answers: dict[str, object] = {}

    def ask(key: str, opted_out: bool) -> None:
        answers[key] = faulty_server.post("/generate", body([LONG], dense=[opted_out]))

    try:
        threads = [threading.Thread(target=ask, args=(f"{i}", i % 2 == 0)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        fault.write_text("")
    for i in range(6):
        answer = answers[f"{i}"]
        if i % 2 == 0:
            assert answer.json()[0]["output_ids"] == healthy["dense"]
        else:
            assert answer.status_code == 500


def test_a_report_that_fails_costs_the_report_alone(
    faulty_server: Server, fault: Path, healthy: dict[str, list[int]]
) -> None:
    fault.write_text("report")
    try:
        answer = faulty_server.generate(input_ids=LONG, sampling_params={"max_new_tokens": 6, "ignore_eos": True})
    finally:
        fault.write_text("")
    assert answer["output_ids"] == healthy["pruned"]
    assert "planted report" in answer["meta_info"]["claa"]["error"]
