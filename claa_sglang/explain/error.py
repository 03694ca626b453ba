"""What stops the command."""

from __future__ import annotations

from claa_sglang.tools.ask_error import AskError


class ExplainError(AskError):
    """Nothing can be explained; the message is one line and says what to do."""
