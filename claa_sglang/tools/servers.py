"""SGLang servers as processes: started, waited for, talked to, and stopped with everything they started.

    with server(model_path, "--enable-claa", "--claa-profile", "profile.json") as running:
        answer = running.generate(text="…", sampling_params={"max_new_tokens": 8})

What the demo, the tests and the benchmarks start their servers with. Nothing of SGLang is imported here.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import requests

from claa_sglang.tools.cpu_env import cpu_environment

LAUNCH = (sys.executable, "-m", "sglang.launch_server")
# SGLang's CPU engine in float32 with a small pool: the same on every machine.
CPU_FLAGS = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--dtype", "float32"),
    *("--max-total-tokens", "20000"),
    *("--max-running-requests", "32"),
    *("--mem-fraction-static", "0.5"),
    *("--random-seed", "0"),
    "--skip-server-warmup",
    "--sleep-on-idle",  # an idle scheduler would spin on one of the cores
)
# Strict accounting in every scheduler step and at idle, and a census of slots in every step; a leak, a slot with two
# owners or a slot of the wrong kind stops the server, and what asks it with it.
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
}
# Servers side by side with two threads each would wait for each other longer than one thread computes.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
START_TIMEOUT = 300.0  # seconds; 20 to 40 on two idle cores
REQUEST_TIMEOUT = 300.0
LOG_TAIL = 60  # lines
# Below those that Linux gives to connections: a server takes half a minute to come to its port, and one that was free
# when asked could be somebody's connection by then.
PORTS = range(20_000, 32_000)


class ServerFailed(RuntimeError):
    """The server did not become ready; the message ends with its log. `log` is the whole log."""

    def __init__(self, reason: str, log: str):
        super().__init__(f"{reason}; the end of its log:\n{_tail(log)}")
        self.log = log


class ServerGone(requests.ConnectionError):
    """A running server hung up, or does not answer any more; the message ends with its log."""


class RequestFailed(RuntimeError):
    """A running server answered with another status than 200; the message has its words."""


class Server:
    """A server's process. `url` has no trailing slash; `log()` is what it has printed so far."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log_file: Path):
        self.url = url
        self.process = process
        self.log_file = log_file

    def wait(self, timeout: float = START_TIMEOUT) -> None:
        """Until it answers. Raises ServerFailed when it exits, or does not within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (status := self.process.poll()) is not None:
                raise ServerFailed(f"the server exited with status {status}", self.log())
            with contextlib.suppress(requests.RequestException):
                if requests.get(self.url + "/health", timeout=30).status_code == 200:
                    return
            time.sleep(0.5)
        raise ServerFailed(f"the server was not ready after {timeout:.0f} s", self.log())

    def generate(
        self,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        text: str | list[str] | None = None,
        sampling_params: Mapping[str, Any] | list[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> Any:
        """The answer of /generate, greedy by default: a dict, or a list of dicts for a batch.

        `more` goes into the request body as it is. Raises RequestFailed with the body on any status but 200.
        """
        params = sampling_params or {}
        if not isinstance(params, list):
            params = {"temperature": 0, **params}
        prompt = {"input_ids": input_ids} if text is None else {"text": text}
        answer = self.post("/generate", {**prompt, "sampling_params": params, **more})
        if answer.status_code != 200:
            raise RequestFailed(f"/generate: HTTP {answer.status_code}: {answer.text}")
        return answer.json()

    def get(self, path: str) -> requests.Response:
        """Raises ServerGone."""
        return self._ask("GET", path)

    def post(self, path: str, json: Any = None) -> requests.Response:
        """Raises ServerGone."""
        return self._ask("POST", path, json)

    def _ask(self, method: str, path: str, json: Any = None) -> requests.Response:
        try:
            return requests.request(method, self.url + path, json=json, timeout=REQUEST_TIMEOUT)
        except requests.ConnectionError as error:
            # Read now: it goes with the server.
            raise ServerGone(f"{path}: {error}; the end of the server's log:\n{_tail(self.log())}") from error

    def flush(self) -> None:
        """Empty the prefix cache. Waits for running requests to end, for at most 30 seconds. Raises RequestFailed."""
        for _ in range(60):
            if (answer := self.post("/flush_cache")).status_code == 200:
                return
            time.sleep(0.5)
        raise RequestFailed(f"/flush_cache: HTTP {answer.status_code}: {answer.text}")

    def left_behind(self) -> str:
        """What an idle server with the plugin still holds, "" if nothing. Empties its prefix cache."""
        slots = self._late_slots()
        if not slots["held"]:
            self.flush()
            slots = self._late_slots()
        return "" if slots["held"] == 0 and slots["free"] == slots["total"] else f"late slots {slots}"

    def _late_slots(self) -> dict[str, int]:
        return self.get("/server_info").json()["claa"]["late_slots"]

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


def _tail(log: str) -> str:
    return "\n".join(line[:2000] for line in log.splitlines()[-LOG_TAIL:])


@contextlib.contextmanager
def launched(
    *flags: str,
    command: Sequence[str] = LAUNCH,
    env: Mapping[str, str] | None = None,
    popen: type[subprocess.Popen[bytes]] = subprocess.Popen,
) -> Iterator[Server]:
    """Run `command` with `flags` on a free port; yield the server, which may not answer yet (`Server.wait`).

    `env` is added to this process's environment. `popen` starts the process. Every process it started is gone when the
    block ends, however it ends, and its log with it.
    """
    with tempfile.TemporaryDirectory(prefix="claa-server-") as temp:
        log_file, port = Path(temp, "server.log"), str(free_port())
        with log_file.open("wb") as log:
            process = popen(
                [*command, "--host", "127.0.0.1", "--port", port, *flags],
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Server(f"http://127.0.0.1:{port}", process, log_file)
        finally:
            stop(process)


@contextlib.contextmanager
def server(
    model_path: str | os.PathLike[str],
    *flags: str,
    env: Mapping[str, str] | None = None,
    timeout: float = START_TIMEOUT,
    popen: type[subprocess.Popen[bytes]] = subprocess.Popen,
) -> Iterator[Server]:
    """As `launched`, of a model; yielded once it answers, its cache empty. Raises ServerFailed."""
    with launched("--model-path", str(model_path), *flags, env=env, popen=popen) as running:
        running.wait(timeout)
        running.flush()
        yield running


def cpu_server(
    model_path: str | os.PathLike[str],
    *flags: str,
    env: Mapping[str, str] | None = None,
    **how: Any,
) -> contextlib.AbstractContextManager[Server]:
    """As `server`, on SGLang's CPU engine with CPU_FLAGS; `flags` come after them and win. how: more of `server`."""
    return server(model_path, *CPU_FLAGS, *flags, env={**cpu_environment(), **(env or {})}, **how)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill `process` and everything it started. Safe to call again.

    Killed, not asked: SGLang answers SIGTERM by draining and then waiting for crash diagnostics, ten seconds
    that every caller would pay.
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


def free_port() -> int:
    """A port of this machine that nobody listens on. Raises OSError where none was found."""
    for port in random.SystemRandom().sample(PORTS, min(len(PORTS), 100)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port found from {PORTS.start} to {PORTS.stop - 1}")
