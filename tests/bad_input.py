"""For tests of bad input: sending anything at all to a server, and somebody else whose answers must stay right."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import requests

from tests import tiny_models
from tests.answers import Ask, ask, check
from tests.engine_server import REQUEST_TIMEOUT, Server
from tests.reference_model import ReferenceModel

# Half of it pruned, half dense.
GOOD = [Ask(tiny_models.prompt(120 + 40 * i, seed=80 + i), keep=0.3 if i % 2 else None, new=6) for i in range(6)]
OURS = re.compile(r'File "[^"]*/(claa_sglang|patches|kernels)/')


class Company(threading.Thread):
    """Sends GOOD until it is stopped, and keeps count of right answers and a list of others."""

    def __init__(self, running: Server, reference: ReferenceModel):
        super().__init__(daemon=True)
        self.running, self.right, self.wrong = running, 0, list[str]()
        self.stopped = threading.Event()
        self.expected = []
        for one in GOOD:
            answer = ask(running, one)
            if one.keep is None:
                check(answer, reference.dense(one.prompt, answer.tokens))
            else:
                check(answer, reference.pruned(one.prompt, answer.tokens, one.keep))
            self.expected.append((answer.tokens, answer.kept))

    def run(self) -> None:
        while not self.stopped.is_set():
            for one, expected in zip(GOOD, self.expected, strict=True):
                try:
                    answer = ask(self.running, one)
                    if (answer.tokens, answer.kept) != expected:
                        raise AssertionError(f"{answer}, kept {answer.kept}")
                    self.right += 1
                except Exception as error:  # whatever it is, the test that caused it must see it
                    self.wrong.append(f"{one}: {error!r}")

    def check(self) -> None:
        """Every answer was right, and all of GOOD is answered once more, sent from now on. Raises AssertionError."""
        target, deadline = self.right + len(GOOD) + 1, time.monotonic() + 120
        while self.right < target and not self.wrong and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.running.process.poll() is None, self.running.log()[-3000:]
        assert not self.wrong, self.wrong[:3]
        assert self.right >= target, "no answers"

    def stop(self) -> None:
        self.stopped.set()
        self.join(REQUEST_TIMEOUT)


def send(running: Server, path: str, body: Any) -> tuple[int, str]:
    """Status and text of an answer. `body` is sent as it is if it is text or bytes, otherwise as JSON.

    A stream that tells of an error, after its status was sent, has the status of the error; one that SGLang breaks
    off, 500.
    """
    data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    header = {"Content-Type": "application/json"}
    try:
        answer = requests.post(running.url + path, data=data, headers=header, timeout=REQUEST_TIMEOUT)
    except requests.exceptions.ChunkedEncodingError as broken:
        return 500, str(broken)
    statuses = [answer.status_code]
    for line in answer.text.splitlines():
        if statuses == [200] and line.startswith("data: {"):
            statuses += _error_status(json.loads(line.removeprefix("data: ")))
    return statuses[-1], answer.text


def _error_status(event: dict[str, Any]) -> list[int]:
    """The status of the error that a server-sent event tells of, if it does."""
    if "error" in event:
        return [event["error"]["code"]]
    finish = event.get("meta_info", {}).get("finish_reason") or {}
    return [finish["status_code"]] if finish.get("status_code") else []


def raised_by_us(log: str) -> list[str]:
    """The tracebacks in a log whose exception was raised in our code."""
    traces = [part.split("\n\n")[0] for part in log.split("Traceback (most recent call last):")[1:]]
    lines = [(trace, re.findall(r'File ".*', trace)) for trace in traces]
    return [trace for trace, files in lines if files and OURS.match(files[-1])]
