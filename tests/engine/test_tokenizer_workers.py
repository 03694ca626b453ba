"""Several tokenizer processes behind one port (`--tokenizer-worker-num`): each checks requests and reports.

They load no plugins; the record of arguments that each is given makes it a process of CLAA. A new connection goes to
either, so a few dozen of them meet both.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import requests

from claa_sglang.tools.cpu_env import cpu_environment
from claa_sglang.tools.servers import CPU_FLAGS, launched
from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, Ask, ask
from tests.engine.conftest import CLAA_FLAGS
from tests.engine_server import QUICKER, ROOT, server
from tests.in_flight import wait_for

pytestmark = pytest.mark.engine

WORKERS = ("--tokenizer-worker-num", "2")
PROMPT = tiny_models.prompt(500, seed=3)
# An application of SGLang's in which one function that we touch is another one: workers import it, the server does not.
OTHER_APP = """
from sglang.srt.entrypoints.http_server import app
from sglang.srt.managers.tokenizer_manager import TokenizerManager

TokenizerManager._validate_one_request = lambda self, obj, input_ids, changed: None
"""


def test_every_worker_checks_and_reports(model: Path) -> None:
    with server(model, *CLAA_FLAGS, *WORKERS, env=STRICT | ONE_THREAD) as running:
        asked = Ask(PROMPT, keep=0.2)
        bad = {"input_ids": PROMPT, "sampling_params": {"custom_params": {"claa": {"keep_rate": 7}}}}
        chat: dict[str, Any] = {"model": "x", "messages": [{"role": "user", "content": "hello " * 60}], "max_tokens": 2}
        wait_for(lambda: running.log().count("Application startup complete") == 2, "both workers are there")
        first = ask(running, asked)
        for _ in range(8):  # some fifty connections
            answer = ask(running, asked)
            assert answer.report["pruned"] and (answer.kept, answer.tokens) == (first.kept, first.tokens)
            for body in (bad, {**bad, "stream": True}):
                refused = running.post("/generate", body)
                assert refused.status_code == 400 and "at most 1" in refused.text
            reply = running.post("/v1/chat/completions", {**chat, "custom_params": {"claa": {"keep_rate": 0.3}}})
            assert reply.json()["metadata"]["claa"]["keep_rate"] == 0.3
            assert running.post("/v1/chat/completions", {**chat, "claa": {"keep_rate": 7}}).status_code == 400
            assert running.get("/server_info").json()["claa"]["hooks"]["ok"]
        assert not running.left_behind()


def test_a_worker_whose_sglang_differs_ends_the_start(model: Path, tmp_path: Path) -> None:
    """uvicorn stops the server when a worker does not come up."""
    (tmp_path / "claa_test_app.py").write_text(OTHER_APP)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**cpu_environment(), **QUICKER, "PYTHONPATH": path, "SGLANG_HTTP_SERVER_APP_PATH": "claa_test_app:app"}
    flags = ("--model-path", str(model), *CPU_FLAGS, *CLAA_FLAGS, *WORKERS)
    with launched(*flags, env=env) as starting:
        wait_for(lambda: "max_total_num_tokens" in starting.log(), "the scheduler is ready")
        wait_for(lambda: "Stopping parent process" in starting.log(), "the server stops")
        log = starting.log()
        assert "claa-sglang: " in log and "TokenizerManager._validate_one_request" in log and "changed" in log
        with pytest.raises(requests.RequestException):
            requests.get(starting.url + "/health", timeout=1)
