"""What stops a run."""

from __future__ import annotations

from claa_sglang.tools.ask_error import AskError


class VerifyError(AskError):
    """Nothing can be verified; the message is one line and says what to do."""
