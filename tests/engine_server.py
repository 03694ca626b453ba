"""Real SGLang servers for tests: started, waited for, talked to, and stopped with all their processes.

    with server(model_path, "--enable-claa", "--chunked-prefill-size", "256") as s:
        answer = s.generate(input_ids=[...], sampling_params={"max_new_tokens": 8, "temperature": 0})

Always the CPU engine, in float32 and small pools, so that a test means the same on every machine. Flags given
by the test come last and win over the defaults here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import requests

from claa_sglang.tools.cpu_env import cpu_environment

DEFAULT_FLAGS = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--dtype", "float32"),
    *("--max-total-tokens", "20000"),
    *("--max-running-requests", "32"),
    *("--mem-fraction-static", "0.5"),
    *("--random-seed", "0"),
    "--skip-server-warmup",
    "--sleep-on-idle",  # an idle scheduler would spin on one of the two cores
)
START_TIMEOUT = 300.0  # seconds; 20 to 40 on two idle cores, but test machines are shared
REQUEST_TIMEOUT = 300.0
LOG_TAIL = 60  # lines


class ServerFailed(RuntimeError):
    """The server did not become ready; the message ends with its log. `log` is the whole log."""

    def __init__(self, reason: str, log: str):
        tail = "\n".join(line[:2000] for line in log.splitlines()[-LOG_TAIL:])
        super().__init__(f"{reason}; the end of its log:\n{tail}")
        self.log = log


class Server:
    """A running server. `url` has no trailing slash; `log()` is what it has printed so far."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log_file: Path):
        self.url = url
        self.process = process
        self.log_file = log_file

    def generate(
        self,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        text: str | list[str] | None = None,
        sampling_params: Mapping[str, Any] | list[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> Any:
        """The answer of /generate, greedy by default: a dict, or a list of dicts for a batch.

        `more` goes into the request body as it is. Raises AssertionError with the body on any status but 200.
        """
        params = sampling_params or {}
        if not isinstance(params, list):
            params = {"temperature": 0, **params}
        prompt = {"input_ids": input_ids} if text is None else {"text": text}
        answer = self.post("/generate", {**prompt, "sampling_params": params, **more})
        assert answer.status_code == 200, f"/generate: HTTP {answer.status_code}: {answer.text}"
        return answer.json()

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=REQUEST_TIMEOUT)

    def post(self, path: str, json: Any = None) -> requests.Response:
        return requests.post(self.url + path, json=json, timeout=REQUEST_TIMEOUT)

    def flush(self) -> None:
        """Empty the prefix cache. Waits for running requests to end, for at most 30 seconds."""
        for _ in range(60):
            if (answer := self.post("/flush_cache")).status_code == 200:
                return
            time.sleep(0.5)
        raise AssertionError(f"/flush_cache: HTTP {answer.status_code}: {answer.text}")

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


@contextlib.contextmanager
def server(
    model_path: str | os.PathLike[str],
    *flags: str,
    env: Mapping[str, str] | None = None,
    timeout: float = START_TIMEOUT,
) -> Iterator[Server]:
    """Start `python -m sglang.launch_server` on a free port; yield it once it answers, its cache empty.

    `env` is added to this process's environment. Raises ServerFailed when it exits or stays silent for
    `timeout` seconds. Every process it started is gone when the block ends, however it ends.
    """
    with tempfile.TemporaryDirectory(prefix="claa-server-") as temp:
        log_file = Path(temp, "server.log")
        port = _free_port()
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model_path)]
        command += ["--host", "127.0.0.1", "--port", str(port), *DEFAULT_FLAGS, *flags]
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, **cpu_environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running = Server(f"http://127.0.0.1:{port}", process, log_file)
        try:
            _wait_until_ready(running, timeout)
            running.flush()
            yield running
        finally:
            stop(process)


def second_plugin(home: Path, name: str, source: str) -> dict[str, str]:
    """Environment in which SGLang finds one more plugin, loaded after ours.

    home: an empty directory, put on PYTHONPATH. name: its module. source: its code, with a function `register`.
    """
    (home / f"{name}.py").write_text(source)
    info = home / f"{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nzzz_{name} = {name}:register\n")
    return {"PYTHONPATH": os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])}


def start_failure(model_path: str | os.PathLike[str], *flags: str, env: Mapping[str, str] | None = None) -> str:
    """The log of a server that must refuse to start. Raises AssertionError if it starts."""
    try:
        with server(model_path, *flags, env=env):
            pass
    except ServerFailed as failure:
        return failure.log
    raise AssertionError(f"the server started with {flags}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill `process` and everything it started. Safe to call again.

    Killed, not asked: SGLang answers SIGTERM by draining and then waiting for crash diagnostics, ten seconds
    that every test would pay.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        # Listed before the parent goes: afterwards nothing links children in sessions of their own to it.
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def _wait_until_ready(running: Server, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (status := running.process.poll()) is not None:
            raise ServerFailed(f"the server exited with status {status}", running.log())
        with contextlib.suppress(requests.RequestException):
            if requests.get(running.url + "/health", timeout=30).status_code == 200:
                return
        time.sleep(0.5)
    raise ServerFailed(f"the server was not ready after {timeout:.0f} s", running.log())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
