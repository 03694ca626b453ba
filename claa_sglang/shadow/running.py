"""When shadow requests are asked: one at a time, while no client waits, and never in the way of one.

A client that arrives ends the one that runs, which waits for another try or is dropped. So do operations that need a
server without requests, such as a weight update: they wait until it is gone.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from claa_sglang.shadow.agreement import Agreement
from claa_sglang.shadow.waiting import Shadow, Waiting

logger = logging.getLogger(__name__)

RID = "claa-shadow-"  # ids of shadow requests begin with it
QUIET = 0.2  # seconds without a client before one is asked: a client that goes on at once is not met
POLL = 0.05  # seconds between two looks
TRIES = 3
GONE = 30.0  # seconds that an operation waits for one that was ended: a step of the scheduler takes far less

Settle = Callable[[Shadow, str, Agreement | None], None]


def is_shadow(rid: object) -> bool:
    """Whether a request of this id is one of ours, as a scheduler sees it."""
    return isinstance(rid, str) and rid.startswith(RID)


class Server(Protocol):
    """The server that is asked."""

    def is_idle(self) -> bool:
        """Whether no client's request is there, and requests would run."""

    def is_leaving(self) -> bool:
        """Whether the server shuts down."""

    async def answer(self, shadow: Shadow, rid: str) -> Agreement | None:
        """Ask it under this id; None if it was ended. Raises what the server raises."""

    def abort(self, rid: str) -> bool:
        """End this request; false if it has not reached the scheduler, and may be cancelled here."""


@dataclass
class _Asked:
    rid: str
    task: asyncio.Task[Agreement | None]
    stopped: bool = False


class Shadows:
    """Of one server process.

    Args:
        server: what is asked.
        settle: called once for each request that was offered, with its result (of `counts.RESULTS`), and what was
            compared where something was.
        waiting: the queue.
        quiet, poll: as QUIET and POLL.
    """

    def __init__(
        self, server: Server, settle: Settle, waiting: Waiting | None = None, quiet: float = QUIET, poll: float = POLL
    ) -> None:
        self._server, self._settle = server, settle
        self.waiting = Waiting() if waiting is None else waiting
        self.weights = 0  # updates so far
        self._quiet, self._poll = quiet, poll
        self._idle_since: float | None = None
        self._holds = 0
        self._asked: _Asked | None = None
        self._task: asyncio.Task[None] | None = None

    def offer(self, shadow: Shadow) -> None:
        """A request that was drawn has its answer. Called from the server's event loop."""
        stale = shadow.weights != self.weights
        for gone in [shadow] if stale else self.waiting.add(shadow):
            self._settle(gone, "dropped", None)
        if len(self.waiting) and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run())

    def client_arrives(self) -> None:
        """A client's request is there: what runs is ended."""
        self._idle_since = None
        self._stop()

    def asks(self, rid: object) -> bool:
        """Whether the request of this id is the one that runs."""
        return self._asked is not None and self._asked.rid == rid

    def forget(self) -> None:
        """Answers so far are of other weights than later ones: none of them is compared any more."""
        self.weights += 1
        for shadow in self.waiting.clear():
            self._settle(shadow, "dropped", None)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Inside, none is asked; the one that runs is ended and gone before."""
        self._holds += 1
        try:
            self._stop()
            if self._asked is not None:
                _, left = await asyncio.wait({self._asked.task}, timeout=GONE)
                if left:
                    logger.warning("CLAA: a shadow request that was ended is still there after %.0f s", GONE)
            yield
        finally:
            self._holds -= 1
            self._idle_since = None

    async def _run(self) -> None:
        """Until none waits."""
        while len(self.waiting):
            if self._server.is_leaving():
                for shadow in self.waiting.clear():
                    self._settle(shadow, "dropped", None)
            elif self._may_ask():
                await self._ask(self.waiting.take())
            else:
                await asyncio.sleep(self._poll)

    def _may_ask(self) -> bool:
        if self._holds or not self._server.is_idle():
            self._idle_since = None
            return False
        now = asyncio.get_running_loop().time()
        if self._idle_since is None:
            self._idle_since = now
        return now - self._idle_since >= self._quiet

    async def _ask(self, shadow: Shadow) -> None:
        shadow.tries += 1
        rid = RID + uuid.uuid4().hex
        task = asyncio.get_running_loop().create_task(self._server.answer(shadow, rid))
        asked = self._asked = _Asked(rid, task)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=self._poll)
                if self._server.is_leaving():
                    self._stop()
        finally:
            self._asked = None
            task.cancel()  # where this one is cancelled
        self._close(shadow, asked)

    def _close(self, shadow: Shadow, asked: _Asked) -> None:
        """One that was asked is over."""
        found = None
        error = None if asked.task.cancelled() else asked.task.exception()
        if error is not None and not asked.stopped:
            logger.warning("CLAA: a shadow request failed: %s: %s", type(error).__name__, error)
            self._settle(shadow, "failed", None)
            return
        if error is None and not asked.task.cancelled():
            found = asked.task.result()
        if shadow.weights != self.weights:
            self._settle(shadow, "dropped", None)
        elif found is not None:
            self._settle(shadow, "same" if found.same else "different", found)
        elif shadow.tries >= TRIES or not self.waiting.put_back(shadow):
            self._settle(shadow, "dropped", None)

    def _stop(self) -> None:
        asked = self._asked
        if asked is None or asked.stopped:
            return
        asked.stopped = True
        if not self._server.abort(asked.rid):
            asked.task.cancel()
