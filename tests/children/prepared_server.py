"""`python -m prepared_server ARGS` is `python -m sglang.launch_server ARGS`, whose children are there sooner.

A server is three processes, and each imports the same packages for ten seconds of a core. Here the first one imports
those that are not SGLang's, and forks before it does anything else. The copies wait until SGLang spawns a process, and
are it: children of the server with its environment, which import SGLang and load its plugins by themselves.
`sitecustomize.py` puts it in the place of `sglang.launch_server`.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import util

# What SGLang imports, without its own modules and without FlashInfer, whose caches SGLang directs before its import.
PACKAGES = (
    "torch._inductor.compile_fx",
    "torch._dynamo.testing",
    "torch.distributed.tensor",
    "torch.onnx",
    "torchvision",
    "transformers.generation",
    "transformers.loss.loss_utils",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.modeling_utils",
    "transformers.processing_utils",
    "aiohttp",
    "fastapi",
    "openai.types.responses",
    "scipy.optimize",
    "uvicorn",
    "xgrammar",
)
COPIES = 3  # two ranks and a detokenizer; a process more starts as ever
MESSAGE = 1 << 17  # bytes

_spawn = util.spawnv_passfds
_waiting: list[tuple[int, socket.socket]] = []


def fork() -> None:
    """Make a copy of this process that waits to be a spawned one, and ends if this one does."""
    ours, its = socket.socketpair(type=socket.SOCK_SEQPACKET)
    if pid := os.fork():
        its.close()
        _waiting.append((pid, ours))
        return
    status = 1
    try:
        ours.close()
        while _waiting:
            _waiting.pop()[1].close()
        status = become(its)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def become(told: socket.socket) -> int:
    """The exit status of the process that this copy is told to be."""
    message, received, _, _ = socket.recv_fds(told, MESSAGE, 64)
    told.close()
    if not message:
        return 0
    what = json.loads(message)
    # As passed to a new process: under the numbers that they have in the one that spawns.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, max(what["fds"]) + 1) for fd in received]
    for fd in received:
        os.close(fd)
    for fd, number in zip(moved, what["fds"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    set_environment(what["environ"])
    at = what["command"].index("-c")
    sys.argv = ["-c", *what["command"][at + 2 :]]
    try:
        exec(what["command"][at + 1])  # multiprocessing's spawn_main
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def set_environment(wanted: dict[str, str]) -> None:
    """Only what differs is touched: where the rest lies tells setproctitle where the name of the process is."""
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})


def spawn(path: str | bytes, command: Sequence[str], fds: Sequence[int]) -> int:
    """In place of multiprocessing's: the pid of a copy that waited, or of a new process if none does."""
    if not _waiting or "--multiprocessing-fork" not in command:
        return _spawn(path, command, fds)
    pid, copy = _waiting.pop(0)
    numbers = sorted(set(map(int, fds)))
    what = {"command": [os.fsdecode(word) for word in command], "environ": dict(os.environ), "fds": numbers}
    with copy:
        socket.send_fds(copy, [json.dumps(what).encode()], numbers)
    return pid


def prepare() -> None:
    """Import PACKAGES."""
    environment = dict(os.environ)
    for package in PACKAGES:
        importlib.import_module(package)
    # An import names folders for caches there, unless SGLang has, which comes later here.
    set_environment(environment)
    assert "sglang" not in sys.modules, "each process imports SGLang itself, which changes it"
    gc.freeze()  # looking for garbage there would write to what all have in common


def serve() -> None:
    """`sglang.launch_server`, with copies of this process to spawn."""
    for _ in range(COPIES):
        fork()
    util.spawnv_passfds = spawn
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    prepare()
    serve()
