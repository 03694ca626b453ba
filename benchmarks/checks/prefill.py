"""What a prefill costs beside the model: host waits, gaps on the GPU and CLAA's own time there, from a trace."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checks import trace
from benchmarks.checks.answers import DENSE, params

CHUNK = 8192
LENGTHS = (10_240, 32_768)
ROUNDS, WARM = 5, 2
OPTIONS: dict[str, Any] = {
    "chunked_prefill_size": CHUNK,
    "max_total_tokens": 2 * max(LENGTHS) + 20_000,
    "mem_fraction_static": 0.95,
    "cuda_graph_max_bs_decode": 4,
    "enable_claa": True,
    "claa_finish": "off",
    "claa_profile": "none",
    "claa_policy": "always",
}


def measure(engine: Any, length: int) -> dict[str, Any]:
    """TTFT, host waits, GPU time and CLAA's part of it, of a prefill of `length` tokens, pruned and dense.

    Pruned as the server is configured: at keep rate 0.2 by default, or by its schedule.
    """
    rng, found = random.Random(length), {}
    fresh = lambda: [rng.randrange(1000, 40_000) for _ in range(length)]  # noqa: E731
    for kind, claa in (("pruned", {"policy": "always"}), ("dense", DENSE)):
        times = []
        for _ in range(WARM + ROUNDS):
            start = time.perf_counter()
            engine.generate(input_ids=fresh(), sampling_params=params(1, claa))
            times.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as directory:
            engine.start_profile(output_dir=directory, activities=["CPU", "GPU"])
            engine.generate(input_ids=fresh(), sampling_params=params(1, claa))
            engine.stop_profile()
            events = trace.read(wait_for_trace(Path(directory)))
        ttft, own = statistics.median(times[WARM:]), trace.own_seconds(events)
        found[kind] = {"ttft seconds": ttft, "waits": trace.waits(events), "own seconds": own}
        found[kind]["gpu seconds"] = trace.gpu_seconds(events)
        found[kind]["kernels: runs, seconds"] = trace.kernel_seconds(events)
        found[kind]["own share"] = sum(own.values()) / ttft
    return found


def wait_for_trace(directory: Path) -> Path:
    """The scheduler writes its trace when it gets around to it. Raises TimeoutError after a minute."""
    for _ in range(600):
        if files := list(directory.rglob("*.trace.json.gz")):
            size = -1
            while size != (size := files[0].stat().st_size):
                time.sleep(0.5)
            return files[0]
        time.sleep(0.1)
    raise TimeoutError(f"no trace in {directory} after a minute")
