"""Streamed answers of /generate, with a clock running."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import requests


class StreamFailed(RuntimeError):
    """The stream did not begin, or ended with an error. `status`: of HTTP. The message has the server's words."""

    def __init__(self, status: int, text: str):
        super().__init__(f"/generate: HTTP {status}: {text}")
        self.status = status


def timed(
    url: str, body: Mapping[str, Any], timeout: float, headers: Mapping[str, str] | None = None
) -> tuple[float, dict[str, Any]]:
    """Seconds from before the request is sent to the first event with a token, and the last event.

    url: of the server, without a trailing slash. body: of /generate; `stream` is added. timeout: seconds without a
    byte.
    Raises StreamFailed, and requests.RequestException where the server cannot be reached.
    """
    first, last = 0.0, {}
    start = time.perf_counter()
    answer = requests.post(
        url + "/generate", json={**body, "stream": True}, stream=True, timeout=timeout, headers=dict(headers or {})
    )
    with answer:
        if answer.status_code != 200:
            raise StreamFailed(answer.status_code, answer.text)
        for line in answer.iter_lines(chunk_size=1):
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - start
                last = json.loads(line[len(b"data: ") :])
    if "meta_info" not in last:
        raise StreamFailed(answer.status_code, str(last))
    return first, last
