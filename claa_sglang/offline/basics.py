"""What a study can fail with, and its defaults: without torch, so that the command line starts at once."""

from __future__ import annotations

WINDOW = 32  # tokens
MAX_ANSWER_TOKENS = 32  # where the oracle's answer is cut


class CaptureError(ValueError):
    """The model or prompt cannot be studied; the text says why and what to do."""


class RecordError(ValueError):
    """The file is not the record that was asked for; the text says why and what to do."""
