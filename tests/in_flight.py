"""Requests in flight, caught at a chosen moment: in the queue, in the middle of their prompt, or decoding.

Where a request is that has not sent anything back yet, only the server's log says: start the server with MOMENT_FLAGS,
and it has a line for every batch. Nothing here waits without a deadline or for a length of time.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests import tiny_models
from tests.answers import Ask
from tests.engine_server import Server

CHUNK = 32
# At most two requests run, so a third one waits; a prompt of 2,000 tokens is in its chunks for seconds.
MOMENT_FLAGS = (
    *("--chunked-prefill-size", str(CHUNK)),
    *("--max-running-requests", "2"),
    *("--decode-log-interval", "1"),
)
STAGES = ("in the queue", "in its chunks", "decoding")
DEADLINE = 120.0  # seconds
_BATCH = re.compile(r"(Prefill|Decode) batch, .*?#running-req: (\d+).*?#queue-req: (\d+)")


class Sent:
    """A request on a connection of its own, whose answer is read later."""

    def __init__(self, server: Server, asked: Ask, rid: str, **more: Any):
        self.rid = rid
        body = {"input_ids": asked.prompt, "sampling_params": asked.params(), "rid": rid, **asked.extra, **more}
        self._connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=300)
        self._connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})

    def answer(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and body, the last event of a stream. Raises OSError or HTTPException if the server hung up."""
        response = self._connection.getresponse()
        text = response.read().decode()
        self._connection.close()
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
        return response.status, json.loads(events[-1] if events else text)

    def hang_up(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class Batch:
    """A line of the log. `running` does not count the requests that are prefilled in it."""

    prefill: bool
    running: int
    queued: int


def end_of_log(server: Server) -> int:
    """In bytes."""
    return server.log_file.stat().st_size


def batches(server: Server, mark: int = 0) -> list[Batch]:
    """The batches that the log names after its first `mark` bytes.

    Only they are read: with a line for every batch a log has megabytes, and what waits reads it fifty times a second.
    """
    with server.log_file.open("rb") as file:
        file.seek(mark)
        found = _BATCH.finditer(file.read().decode(errors="replace"))
    return [Batch(m[1] == "Prefill", int(m[2]), int(m[3])) for m in found]


def wait_for(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> None:
    """Until `condition` is true; AssertionError after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"not within {deadline:.0f} s: {what}"
        time.sleep(0.02)


def companion(index: int, new: int) -> Ask:
    """What runs beside the request to be caught."""
    return Ask(tiny_models.prompt(100, seed=500 + index), keep=0.3, new=new)


def catch(
    server: Server, stage: str, target: Ask, company: int = 300, **more: Any
) -> tuple[list[tuple[Ask, Sent]], Sent]:
    """Pruned companions that decode `company` tokens, with what they asked for, and `target`, now at `stage`.

    Its prompt must be of thousands of tokens to be caught in its chunks, its answer of hundreds to be caught
    decoding. `more` goes into its body.
    """
    mark = end_of_log(server)
    beside: list[tuple[Ask, Sent]] = []
    for index in range(2 if stage == "in the queue" else 1):
        asked = companion(index, company)
        beside.append((asked, Sent(server, asked, f"companion-{index}-{mark}")))
        wait_for(lambda: _last(server, mark) == Batch(False, len(beside), 0), "a companion decodes")
    mark = end_of_log(server)
    sent = Sent(server, target, f"target-{mark}", **more)
    if stage == "in the queue":
        wait_for(lambda: _last(server, mark).queued == 1, "the request waits")
    elif stage == "in its chunks":
        wait_for(lambda: sum(b.prefill for b in batches(server, mark)) >= 4, "four chunks have run")
    else:
        both = Batch(False, 2, 0)
        wait_for(lambda: batches(server, mark).count(both) >= 4, "it has decoded")
    return beside, sent


def _last(server: Server, mark: int) -> Batch:
    return next(reversed(batches(server, mark)), Batch(False, 0, 0))
