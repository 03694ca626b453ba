"""What is going on, while it goes on: in a terminal and in a pipe, with the seconds since the start."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

HEARTBEAT = 15.0  # seconds between signs of life where there is no terminal to show a spinner in


class Progress:
    """Lines on `console`, each with the whole seconds since this was made."""

    def __init__(self, console: Console, heartbeat: float = HEARTBEAT):
        self._console, self._heartbeat = console, heartbeat
        self._start = time.monotonic()

    def line(self, text: str) -> None:
        """One line, at once: a pipe is not left waiting for a buffer."""
        self._console.print(f"[dim]\\[{time.monotonic() - self._start:4.0f} s][/] {escape(text)}", highlight=False)
        self._console.file.flush()

    @contextlib.contextmanager
    def step(self, text: str, announce: bool = True) -> Iterator[None]:
        """Say that `text` begins and, while the block runs, that it still does: a spinner, or a line now and then.

        announce: with a line of its own when it begins; not needed where the caller writes one as soon as it is over.
        """
        if announce:
            self.line(text)
        if self._console.is_terminal:
            with self._console.status(escape(text)):
                yield
            return
        over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(f"... {text}", over), daemon=True)
        beat.start()
        try:
            yield
        finally:
            over.set()
            beat.join()

    def _beat(self, text: str, over: threading.Event) -> None:
        while not over.wait(self._heartbeat):
            self.line(text)
