"""Reading a profiler trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.checks import trace


def call(name: str, ts: int, correlation: int, tid: int = 1) -> dict:
    return {"cat": "cuda_runtime", "name": name, "ts": ts, "dur": 1, "tid": tid, "args": {"correlation": correlation}}


EVENTS = [
    {"cat": "user_annotation", "name": "claa::score", "ts": 10, "dur": 10, "tid": 1},
    {"cat": "user_annotation", "name": "claa::prune", "ts": 30, "dur": 10, "tid": 1},
    {"cat": "user_annotation", "name": "step", "ts": 0, "dur": 100, "tid": 1},
    call("cudaLaunchKernel", 5, 1),
    call("cudaLaunchKernel", 12, 2),
    call("cudaLaunchKernel", 15, 3),
    call("cudaLaunchKernel", 15, 4, tid=2),
    call("cudaMemcpyAsync", 31, 5),
    call("cudaStreamSynchronize", 50, 6),
    call("cudaEventSynchronize", 60, 7),
    call("cudaEventSynchronize", 70, 8),
    *({"cat": "kernel", "name": "k", "ts": 200, "dur": 100, "args": {"correlation": c}} for c in (1, 2, 3, 4)),
    {"cat": "gpu_memcpy", "name": "m", "ts": 300, "dur": 7, "args": {"correlation": 5}},
]


def test_own_time_is_that_of_what_the_marks_launched(tmp_path: Path) -> None:
    file = tmp_path / "a.trace.json.gz"
    with gzip.open(file, "wt") as out:
        json.dump({"traceEvents": EVENTS}, out)
    found = trace.own_seconds(trace.read(file))
    assert found == {"claa::score": pytest.approx(200e-6), "claa::prune": pytest.approx(7e-6)}


def test_waits_are_counted_by_call() -> None:
    assert trace.waits(EVENTS) == {"cudaStreamSynchronize": 1, "cudaEventSynchronize": 2}


def test_the_gpu_is_busy_where_any_kernel_runs() -> None:
    kernels = [{"cat": "kernel", "name": "k", "ts": ts, "dur": dur} for ts, dur in ((10, 5), (12, 1), (14, 6), (30, 1))]
    assert trace.gpu_seconds(kernels) == {"busy": pytest.approx(11e-6), "idle": pytest.approx(10e-6)}
    assert trace.gpu_seconds([]) == {"busy": 0, "idle": 0}


def test_kernels_are_summed_by_name_longest_first() -> None:
    kernels = [{"cat": "kernel", "name": name, "ts": 0, "dur": dur} for name, dur in (("a", 2), ("b", 5), ("a", 2))]
    assert trace.kernel_seconds(kernels) == {"b": (1, pytest.approx(5e-6)), "a": (2, pytest.approx(4e-6))}
    assert list(trace.kernel_seconds(kernels, most=1)) == ["b"]
