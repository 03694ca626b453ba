"""How a start ends that cannot work as asked."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

# Imported where HTTP is served: by the server, and by the workers of --tokenizer-worker-num.
HTTP = "sglang.srt.entrypoints.http_server"


class StartupError(RuntimeError):
    """`--enable-claa` cannot work as asked; the text has every reason, each with a remedy."""


def stop(server_args: Any, text: str) -> NoReturn:
    """Stop the start with `text`: StartupError in Python, a clean exit from the command line or in a child process."""
    text = f"claa-sglang: {text}"
    command = getattr(server_args, "launch_command", None)
    from_python = command is None or str(command).startswith("Engine(")
    server = getattr(server_args, "_claa_server_pid", os.getpid())
    # SGLang runs servers from Python too, where ending the interpreter is not ours to decide.
    if from_python and server == os.getpid():
        raise StartupError(text)
    if server != os.getpid() and HTTP in sys.modules:
        # A worker that ends is started again, for ever. SGLang's children tell its server in this way that they failed.
        print(text, file=sys.stderr, flush=True)
        os.kill(server, signal.SIGQUIT)
    raise SystemExit(text)
