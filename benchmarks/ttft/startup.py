"""What the plugin adds to the start of an engine: stock and pruned ones are started and stopped by turns.

Seconds from the start of a process that has imported nothing to an engine that takes requests. The time varies by more
than the plugin may add, so medians are compared, not rounds.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.ttft.engines import EngineProcess
from benchmarks.ttft.run import Run
from benchmarks.ttft.scenarios import Samples
from benchmarks.ttft.variants import CLAA, START, STOCK


def measure(run: Run, options: dict[str, dict[str, Any]], chunk: int) -> None:
    """Start each engine of `options` once per round. Raises OutOfTime."""

    def start_all(index: int) -> Samples:
        samples: Samples = {}
        names = {"stock": STOCK, "claa": CLAA}
        for name in names if index % 2 else reversed(names):
            started = time.perf_counter()
            engine = EngineProcess(options[name])
            try:
                engine.wait()
                samples[START, names[name]] = time.perf_counter() - started
            finally:
                engine.stop()
        return samples

    run.rounds("startup", 0, chunk, start_all)
