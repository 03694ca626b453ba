"""`sglang.Engine` for benchmarks, on the GPU if there is one: the only place here that starts engines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from claa_sglang.tools.cpu_env import enter_cpu_environment

# Without a GPU. A share of the memory, as others may be using the rest.
CPU_OPTIONS = {"device": "cpu", "attention_backend": "torch_native", "mem_fraction_static": 0.4}


class Started(NamedTuple):
    """A running `sglang.Engine`, and the seconds its start took, the import of SGLang left out."""

    engine: Any
    seconds: float


def enter_device() -> str | None:
    """Name of the GPU that engines of this process will use; None without one, and they may then use the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    enter_cpu_environment()
    return None


def start(options: Mapping[str, Any]) -> Started:
    """An engine in this process, with these options as they are; whoever starts it calls its `shutdown`."""
    import sglang

    began = time.perf_counter()
    engine = sglang.Engine(**options)
    return Started(engine, time.perf_counter() - began)


@contextlib.contextmanager
def running(options: Mapping[str, Any]) -> Iterator[Started]:
    """As `start`, shut down when the block ends."""
    started = start(options)
    try:
        yield started
    finally:
        started.engine.shutdown()
