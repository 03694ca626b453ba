"""What a Python process that tests start runs first, as `tests/conftest.py` puts this folder on PYTHONPATH.

It makes servers start and compute sooner, and changes nothing that they answer.
"""

import os
from multiprocessing import process

M_PERTURB = -6  # of glibc's malloc.h
# What glibc fills memory with: 0x3c where it gives it out, 0xc3 where it takes it back. Either is a common float32.
FILL = 195
# Set for servers of `tests/engine_server.py` alone.
QUICKER = "CLAA_TEST_QUICKER"

_run = process.BaseProcess.run


def run(self: process.BaseProcess) -> None:
    """From here on memory is filled: SGLang's processes have imported their modules, and begin their work.

    SGLang's torch_native attention computes with rows that nobody wrote, and drops what comes out. Small integers that
    were there before are denormal floats: a prompt of 2,000 tokens in chunks of 32 took 49 s with them and takes 4 s.
    MALLOC_PERTURB_ would fill memory from the start, which costs a sixth of the time that the imports take.
    """
    import ctypes

    ctypes.CDLL(None).mallopt(M_PERTURB, FILL)
    _run(self)


process.BaseProcess.run = run

if QUICKER in os.environ:
    import gc
    import sys

    # Modules are no garbage, and it is looked for less often among them.
    gc.set_threshold(50_000, 20, 100)
    # FlashInfer does without it. It is for kernels of GPUs, and its import takes a tenth of a server's start.
    sys.modules["cutlass"] = None  # type: ignore[assignment]

    # There, a server's children have less to import.
    if sys.orig_argv[1:3] == ["-m", "sglang.launch_server"]:
        os.execv(sys.executable, [sys.executable, "-m", "prepared_server", *sys.orig_argv[3:]])
