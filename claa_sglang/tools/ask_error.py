"""What commands that ask a server raise. Imports nothing: the command line imports it first."""

from __future__ import annotations


class AskError(RuntimeError):
    """A server cannot be asked, or does not answer as it should; the message is one line and says what to do."""


def one_line(text: str, most: int = 300) -> str:
    """`text` without line breaks, cut off after `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
