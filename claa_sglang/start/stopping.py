"""How a start ends that cannot work as asked."""

from __future__ import annotations

import os
from typing import Any, NoReturn


class StartupError(RuntimeError):
    """`--enable-claa` cannot work as asked; the text has every reason, each with a remedy."""


def stop(server_args: Any, text: str) -> NoReturn:
    """Stop the start with `text`: StartupError in Python, a clean exit from the command line or in a child process."""
    text = f"claa-sglang: {text}"
    command = getattr(server_args, "launch_command", None)
    from_python = command is None or str(command).startswith("Engine(")
    # SGLang runs servers from Python too, where ending the interpreter is not ours to decide.
    if from_python and getattr(server_args, "_claa_server_pid", os.getpid()) == os.getpid():
        raise StartupError(text)
    raise SystemExit(text)
