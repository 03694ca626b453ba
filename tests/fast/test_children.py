"""`tests/children/sitecustomize.py`: what it does for servers that tests start is done, and in them alone."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys


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
