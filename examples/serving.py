"""Start an SGLang server for the demo, ask it with a clock running, and stop it again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

REQUEST_TIMEOUT = 600.0  # seconds
START_TIMEOUT = 600.0


@dataclass(frozen=True)
class Answer:
    """One answer: its text, the seconds to the first token, and SGLang's `meta_info`."""

    text: str
    ttft: float
    meta: Mapping[str, Any]

    @property
    def claa(self) -> Mapping[str, Any]:
        """The plugin's report; empty from a stock server."""
        return self.meta.get("claa") or {}


@contextlib.contextmanager
def serve(model_path: Path, flags: list[str], env: Mapping[str, str]) -> Iterator[str]:
    """Run `python -m sglang.launch_server` and yield its URL once it answers; its processes end with the block.

    Raises RuntimeError with the end of the server's log when it exits or is not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model_path)]
    command += ["--host", "127.0.0.1", "--port", port, *flags]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            problem = _wait_until_ready(url, process)
            if problem:
                log.seek(0)
                tail = "".join(line[:1000] for line in log.readlines()[-30:])
                raise RuntimeError(f"the server {problem}; the end of its log:\n{tail}")
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(url: str, text: str, max_new_tokens: int, options: Mapping[str, Any] | None) -> Answer:
    """Greedy answer to `text`, a prompt with its chat template applied. `options` go to the plugin, per request.

    The clock runs from before the request is sent to the first token that arrives.
    """
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_new_tokens}
    if options is not None:
        params["custom_params"] = {"claa": dict(options)}
    body = {"text": text, "sampling_params": params, "stream": True}
    ttft, last = 0.0, {}
    start = time.perf_counter()
    with requests.post(url + "/generate", json=body, stream=True, timeout=REQUEST_TIMEOUT) as response:
        if response.status_code != 200:
            raise RuntimeError(f"/generate: HTTP {response.status_code}: {response.text}")
        for line in response.iter_lines(chunk_size=1):
            if not line.startswith(b"data: {"):
                continue
            ttft = ttft or time.perf_counter() - start
            last = json.loads(line[len(b"data: ") :])
    if "meta_info" not in last:
        raise RuntimeError(f"/generate failed: {last}")
    return Answer(text=last["text"].strip(), ttft=ttft, meta=last["meta_info"])


def flush(url: str) -> None:
    """Empty the prefix cache. Raises RuntimeError if the server stays busy for 30 seconds."""
    for _ in range(60):
        if requests.post(url + "/flush_cache", timeout=REQUEST_TIMEOUT).status_code == 200:
            return
        time.sleep(0.5)
    raise RuntimeError("the server stays busy and does not flush its cache")


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> str | None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"exited with status {process.returncode}"
        with contextlib.suppress(requests.RequestException):
            if requests.get(url + "/health", timeout=30).status_code == 200:
                return None
        time.sleep(0.5)
    return f"was not ready after {START_TIMEOUT:.0f} s"
