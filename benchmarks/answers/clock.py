"""The deadline of a run, and lines that say how far it is."""

from __future__ import annotations

import time


class Clock:
    """Begins when it is made. seconds: until everything is written. finish: of them, for merging at the end."""

    def __init__(self, seconds: float, finish: float):
        self._began = time.monotonic()
        self.seconds = seconds
        self.asking = seconds - finish

    @property
    def passed(self) -> float:
        return time.monotonic() - self._began

    def left_to_ask(self) -> float:
        """Seconds; below 0 when asking is over."""
        return self.asking - self.passed

    def left(self) -> float:
        return self.seconds - self.passed

    def say(self, text: str) -> None:
        print(f"[{self.passed:6.1f} s] {text}", flush=True)
