"""`tests/children/`: what it does for servers that tests start is done, and in them alone."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from multiprocessing import util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests import nursery
from tests.conftest import ROOT


def filled(size: int = 4096) -> bytes:
    """Memory as glibc gives it out."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    return ctypes.string_at(libc.malloc(ctypes.c_size_t(size)), size)


def test_a_child_of_multiprocessing_gets_memory_filled_with_common_floats() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(filled) == bytes([0x3C]) * 4096


def test_only_quicker_servers_do_without_cutlass() -> None:
    code = "import sys, gc; print('cutlass' in sys.modules, gc.get_threshold()[0])"

    def said(**env: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **env}
        ).stdout.strip()

    assert said() == "False 700"
    assert said(CLAA_TEST_QUICKER="1") == "True 50000"


def tell(sender: Connection) -> None:
    """What the parent, its environment and its modules are, as a spawned process sees them."""
    names = ("fractions", "graphlib")
    sender.send((os.getpid(), os.getppid(), os.environ.get("LATER"), [name in sys.modules for name in names]))


def spawn_three() -> None:
    """Two copies wait, so the third process is a new one. Prints what each says, and how it ends."""
    import fractions  # noqa: F401

    import prepared_server

    for _ in range(2):
        prepared_server.fork()
    util.spawnv_passfds = prepared_server.spawn
    import graphlib  # noqa: F401

    os.environ["LATER"] = "told"
    context, said = multiprocessing.get_context("spawn"), []
    for _ in range(3):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=tell, args=(sender,))
        process.start()
        sender.close()
        pid, parent, later, modules = receiver.recv()
        process.join()
        said.append([pid == process.pid, parent == os.getpid(), later, modules, process.exitcode])
    failing = context.Process(target=sys.exit, args=(7,))
    failing.start()
    failing.join()
    print(json.dumps([*said, failing.exitcode]))


def test_processes_of_a_prepared_server_are_copies_from_before_it_did_anything() -> None:
    """They are its children, with its environment and pipes, and have none of the modules that it imported later."""
    code = "from tests.fast import test_children; test_children.spawn_three()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    copy, new = ([True, True, "told", modules, 0] for modules in ([True, False], [False, False]))
    assert json.loads(done.stdout) == [copy, copy, new, 7]


def test_a_copy_that_nobody_needed_ends_with_the_server() -> None:
    code = "import prepared_server; prepared_server.fork()"
    # It has the pipe to here as well, which is read to its end.
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)


def test_only_quicker_servers_are_prepared(tmp_path: Path) -> None:
    says = "import sys; print(__name__, __spec__.name, *sys.argv[1:])"
    (tmp_path / "prepared_server.py").write_text(says)
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    (tmp_path / "sglang" / "launch_server.py").write_text(says)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])

    def said(**env: str) -> str:
        command = [sys.executable, "-m", "sglang.launch_server", "--port", "7"]
        environ = {**os.environ, "PYTHONPATH": path, **env}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout.strip()

    assert said() == "__main__ sglang.launch_server --port 7"
    assert said(CLAA_TEST_QUICKER="1") == "__main__ prepared_server --port 7"


STUB = """
import os, sys
from prepared_server_of_tests import set_environment

def prepare():
    print("prepared", flush=True)

def serve():
    print(os.getpid(), os.getppid(), os.getsid(0), os.environ["CLAA_TEST_SAYS"], *sys.argv[1:], flush=True)
    sys.exit(int(sys.argv[1]))
"""


def test_a_nursery_forks_servers_that_are_children_of_who_asked(tmp_path: Path, monkeypatch: Any) -> None:
    """Each with its own session, environment, arguments and end, of one process that was prepared once."""
    shutil.copy(ROOT / "tests" / "children" / "prepared_server.py", tmp_path / "prepared_server_of_tests.py")
    (tmp_path / "prepared_server.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    said = []
    for status in (3, 0):
        with (tmp_path / "log").open("wb") as log:
            command = [sys.executable, "-m", "sglang.launch_server", str(status), "--port"]
            env = {**os.environ, "CLAA_TEST_SAYS": f"says {status}"}
            server = nursery.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        assert server.wait(60) == status
        said.append((tmp_path / "log").read_text().strip())
        assert said[-1] == f"{server.pid} {os.getpid()} {server.pid} says {status} {status} --port"


def test_a_server_with_other_modules_on_its_path_is_started(tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    (tmp_path / "sglang" / "launch_server.py").write_text("import sys; sys.exit(5)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "sglang.launch_server"]
        server = nursery.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    assert server.wait(60) == 5
