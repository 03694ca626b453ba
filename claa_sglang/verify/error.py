"""What stops a run."""

from __future__ import annotations


class VerifyError(RuntimeError):
    """Nothing can be verified; the message is one line and says what to do."""


def one_line(text: str, most: int = 300) -> str:
    """`text` without line breaks, cut off after `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
