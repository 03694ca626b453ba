"""Servers that are forked, not started: `Popen` in the place of subprocess's, for `tests/engine_server.py`.

    process = nursery.Popen([sys.executable, "-m", "sglang.launch_server", *flags], env=..., stdout=log, ...)

`tests/children/nursery.py` says what forks them.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

SET_CHILD_SUBREAPER = 36  # of Linux's prctl.h
# What may differ between a server and what forks it: only SGLang, the plugin and pytest read it.
OF_ONE_SERVER = ("SGLANG_", "CLAA_", "PYTEST_")


class Popen(subprocess.Popen[bytes]):
    """A server, of a `python -m sglang.launch_server` and its flags, in a session of its own.

    One with other modules than this process on its path is started as ever.
    """

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:  # type: ignore[override]
        given = dict(zip(_PARAMETERS, rest, strict=True))
        if given["env"].get("PYTHONPATH") != os.environ.get("PYTHONPATH"):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        files = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        order = {"arguments": list(args[3:]), "environ": given["env"], "directory": os.getcwd()}
        self.pid = _nursery(given["env"]).fork(order, files)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]


# Of subprocess.Popen._execute_child, after the command.
_PARAMETERS = (
    *("executable", "preexec_fn", "close_fds", "pass_fds", "cwd", "env", "startupinfo", "creationflags", "shell"),
    *("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite", "restore_signals", "gid", "gids", "uid"),
    *("umask", "start_new_session", "process_group"),
)


class Nursery:
    """The process that forks servers with one environment; it ends with this one."""

    def __init__(self, environ: Mapping[str, str]):
        self._orders, its = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with its:
            command = [sys.executable, "-m", "nursery", str(its.fileno())]
            self._process = subprocess.Popen(command, env=environ, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)

    def fork(self, order: Mapping[str, Any], files: Sequence[int]) -> int:
        """The pid of a new child of this process."""
        with _adopting_orphans():
            socket.send_fds(self._orders, [json.dumps(order).encode()], files)
            answer = self._orders.recv(64)
        if not answer:
            raise OSError(f"what forks servers has ended with status {self._process.wait()}")
        return int(answer)


_nurseries: dict[frozenset[tuple[str, str]], Nursery] = {}


def _nursery(environ: Mapping[str, str]) -> Nursery:
    shared = {name: value for name, value in environ.items() if not name.startswith(OF_ONE_SERVER)}
    key = frozenset(shared.items())
    if key not in _nurseries:
        _nurseries[key] = Nursery(environ)
    return _nurseries[key]


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Not for longer: what servers leave behind when they are killed is for init to clear away."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)
