"""Requests in flight, caught at a chosen moment: in the queue, in the middle of their prompt, or decoding.

Where a request is that has not sent anything back yet, only the server's log says: start the server with MOMENT_FLAGS,
and it has a line for every batch. Nothing here waits without a deadline or for a length of time.
"""

from __future__ import annotations

import http.client
import json
import re
import select
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
TRIES = 5
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

    def is_answered(self) -> bool:
        """Whether something came back, of which `answer` took nothing yet."""
        return bool(select.select([self._connection.sock], [], [], 0)[0])

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
    decoding. `more` goes into its body. On a busy machine this process may wait seconds for a core: where a companion
    was answered before the target was at its stage, all of them are let go and caught again.
    """
    for _ in range(TRIES):
        caught = Catch(server)
        if caught.companions(2 if stage == "in the queue" else 1, company) and caught.target(stage, target, more):
            return caught.beside, caught.sent[-1]
        server.post("/abort_request", {"abort_all": True})
        for sent in caught.sent:
            sent.answer()
    raise AssertionError(f"{TRIES} times a companion of {company} tokens was answered too soon: {stage}")


class Catch:
    """One try of `catch`. Its two steps say whether all companions still run."""

    def __init__(self, server: Server):
        self.server = server
        self.beside: list[tuple[Ask, Sent]] = []
        self.sent: list[Sent] = []

    def companions(self, count: int, new: int) -> bool:
        mark = end_of_log(self.server)
        for index in range(count):
            asked = companion(index, new)
            self.sent.append(Sent(self.server, asked, f"companion-{index}-{mark}"))
            self.beside.append((asked, self.sent[-1]))
            if not self._decode_alone(mark):
                return False
        return True

    def _decode_alone(self, mark: int) -> bool:
        decode = Batch(False, len(self.beside), 0)
        return self._wait(lambda: self._last(mark) == decode, "a companion decodes")

    def target(self, stage: str, asked: Ask, more: dict[str, Any]) -> bool:
        mark = end_of_log(self.server)
        self.sent.append(Sent(self.server, asked, f"target-{mark}", **more))
        both = Batch(False, 2, 0)
        reached: dict[str, Callable[[], Any]] = {
            "in the queue": lambda: self._last(mark).queued == 1,
            "in its chunks": lambda: sum(batch.prefill for batch in batches(self.server, mark)) >= 4,
            "decoding": lambda: batches(self.server, mark).count(both) >= 4,
        }
        return self._wait(reached[stage], f"the request is {stage}")

    def _wait(self, condition: Callable[[], Any], what: str) -> bool:
        """Until `condition` is true, or a companion is answered."""
        wait_for(lambda: self._answered() or condition(), what)
        return not self._answered()

    def _answered(self) -> bool:
        return any(sent.is_answered() for _, sent in self.beside)

    def _last(self, mark: int) -> Batch:
        return next(reversed(batches(self.server, mark)), Batch(False, 0, 0))
