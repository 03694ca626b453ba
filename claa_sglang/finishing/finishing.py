"""What one scheduler knows of its finishing: what waits, what was finished, when it may go on, and what it took."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from claa_sglang.finishing.finished import Finished
from claa_sglang.finishing.queue import FinishQueue

QUIET = 0.1  # seconds without a forward before the first step
# The same where requests keep coming: BUSY of them or more ended within BUSY_SECONDS. One that arrives would find a
# step before it in every gap; with four a second, one gap in eight is as long as this. Requests are counted, not the
# gaps between them: at a high load several end before there is one.
BUSY_QUIET, BUSY, BUSY_SECONDS = 0.5, 4, 2.0


@dataclass(slots=True)
class Finishing:
    """Of one scheduler.

    Attributes:
        queue: prefixes that wait. finished: those that were made dense.
        prefixes, tokens: made dense since the start. steps, seconds: that it took.
        clock: seconds that only grow.
        granted: of several tensor-parallel ranks, each is told when a step is due: while so many forwards have run.
        ends: when requests ended, the latest times.
    """

    queue: FinishQueue = field(default_factory=FinishQueue)
    finished: Finished = field(default_factory=Finished)
    prefixes: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    clock: Callable[[], float] = time.monotonic
    granted: int | None = None
    ends: deque[float] = field(default_factory=lambda: deque([-math.inf], maxlen=BUSY))
    _forwards: int = -1
    _quiet_since: float = -math.inf

    def ended(self) -> None:
        """A request of anybody's ended."""
        self.ends.append(self.clock())

    def is_due(self, forwards: int) -> bool:
        """Whether something waits and no forward ran for a while. forwards: how many ran so far.

        Asked again and again while the server has nothing to do.
        """
        now = self.clock()
        if forwards != self._forwards:
            self._forwards = forwards
            self._quiet_since = now
        busy = len(self.ends) == BUSY and now - self.ends[0] < BUSY_SECONDS
        return len(self.queue) > 0 and now - self._quiet_since >= (BUSY_QUIET if busy else QUIET)

    def is_granted(self, forwards: int) -> bool:
        """As `is_due`, of each of several ranks: whether the first one said so, which alone asks the clock. Once."""
        granted, self.granted = self.granted == forwards, None
        return granted and len(self.queue) > 0

    def ran(self, forwards: int) -> None:
        """A step of ours ran, after `forwards` forwards in all: what follows need not wait again."""
        self._forwards = forwards
        self.steps += 1

    def clear(self) -> None:
        """The prefix cache was emptied."""
        self.queue.clear()
        self.finished.clear()

    def stats(self) -> dict[str, float]:
        """Numbers for /server_info and /metrics: prefixes waiting, finished and dropped, tokens, steps, seconds."""
        return {
            "waiting": len(self.queue),
            "finished": self.prefixes,
            "dropped": self.queue.dropped,
            "tokens": self.tokens,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
        }
