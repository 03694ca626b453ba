"""What a profiler trace of SGLang's scheduler says: waits of the host, the GPU's, and time of CLAA's own steps.

A trace is what `Engine.start_profile` writes, torch's Chrome trace. CLAA marks its steps in it: `claa::score`,
`claa::store`, `claa::prune`, `claa::leave`.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

# CUDA calls in which the host waits for the device.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
OWN = "claa::"
NAME = 120  # characters of a kernel's name; template arguments go on for pages
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def read(path: Path) -> list[dict[str, Any]]:
    """Events of one trace file."""
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def waits(events: list[dict[str, Any]]) -> dict[str, int]:
    """How often the host waited, by CUDA call."""
    names = Counter(e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    return {name: names[name] for name in WAITS if names[name]}


def own_seconds(events: list[dict[str, Any]]) -> dict[str, float]:
    """GPU time of each of CLAA's steps: the kernels launched inside its marks, without the gaps between them."""
    marks = sorted(
        (e["ts"], e["ts"] + e["dur"], e["tid"], e["name"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith(OWN)
    )
    launched = {}  # correlation of a launch -> the mark it happened in
    for event in events:
        if event.get("cat") not in ("cuda_runtime", "cuda_driver") or "correlation" not in event.get("args", {}):
            continue
        for start, end, thread, name in marks:
            if thread == event["tid"] and start <= event["ts"] <= end:
                launched[event["args"]["correlation"]] = name
    total: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in ON_GPU:
            name = launched.get(event.get("args", {}).get("correlation"))
            if name is not None:
                total[name] += event["dur"] * 1e-6
    return dict(total)


def gpu_seconds(events: list[dict[str, Any]]) -> dict[str, float]:
    """From the first kernel to the end of the last, how long the GPU was `busy` and how long `idle`."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ON_GPU)
    busy, until = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    idle = until - spans[0][0] - busy if spans else 0.0
    return {"busy": busy * 1e-6, "idle": idle * 1e-6}


def kernel_seconds(events: list[dict[str, Any]], most: int = 20) -> dict[str, tuple[int, float]]:
    """The kernels that took longest: how often each ran, and for how long together."""
    runs: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in ON_GPU:
            name = event["name"][:NAME]
            runs[name] += 1
            total[name] += event["dur"] * 1e-6
    return {name: (runs[name], seconds) for name, seconds in total.most_common(most)}
