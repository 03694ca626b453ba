"""Make the record of the machine this runs on: matrix products, attention, memory and launches, in seconds."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch

from claa_sglang.plan.error import PlanError
from claa_sglang.plan.machine import Dtype, Machine
from claa_sglang.plan.model import Shape
from claa_sglang.policy.machine import measure_rates, median_seconds
from claa_sglang.policy.rates import LAUNCHES, PRUNE_LAUNCHES

SIZES = (4096, 32, 128)  # hidden size, heads and elements of a head: of an 8B model
CPU_SIZES = (1024, 16, 64)  # a CPU serves smaller ones
GPU_ROWS, CPU_ROWS = 8192, 1024
RUNS = 10  # of which the fastest counts: what else runs here meanwhile is no property of the machine
GPU_BYTES, CPU_BYTES = 2**30, 2**27  # more than caches hold
# What SGLang's host takes for a layer, in launches of a kernel that does nothing: 0.3 and 1.2 ms on an H200's host
# (machines/h200.json), where one takes about 5 us.
GRAPH_LAUNCHES, EAGER_LAUNCHES = 60, 240
# What a request pays once: of a stock engine on an H200's host and on two CPU cores (benchmarks/plan_error.py).
REQUEST = 0.007


def measured(dtype: Dtype | None = None, shape: Shape | None = None) -> Machine:
    """This machine: its first GPU, or its processor where there is none.

    Args:
        shape: the model at whose sizes it is measured; by default about those of an 8B model, on a CPU of a small one.
        dtype: of the numbers; by default bfloat16 on a GPU, float32 on a CPU.

    Raises PlanError: the GPU has too little free memory, or does not know the type.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return _of(device, dtype or ("bfloat16" if device.type == "cuda" else "float32"), shape)
    except RuntimeError as error:  # torch's own, out-of-memory included
        told = " ".join(str(error).split())[:200]
        raise PlanError(f"--measure: {told}. Free the device, or give another --dtype") from error


def _of(device: torch.device, dtype: Dtype, shape: Shape | None) -> Machine:
    kind: torch.dtype = getattr(torch, dtype)
    gpu = device.type == "cuda"
    own = None if shape is None else (shape.hidden, shape.heads, shape.head_dim)
    hidden, heads, head_dim = own or (SIZES if gpu else CPU_SIZES)
    sizes: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "dtype": kind, "device": device}
    rows = GPU_ROWS if gpu else CPU_ROWS
    runs = [measure_rates(hidden_size=hidden, rows=rows, **sizes) for _ in range(RUNS)]
    launch = min(run.launch for run in runs)
    return Machine(
        device=torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        dtype=dtype,
        matmul=max(run.matmul for run in runs),
        attention=max(run.attention for run in runs),
        bandwidth=_bandwidth(kind, device),
        request=REQUEST,
        graph_layer=launch * (GRAPH_LAUNCHES if gpu else LAUNCHES),
        eager_layer=launch * (EAGER_LAUNCHES if gpu else LAUNCHES),
        prune=0.0 if gpu else launch * PRUNE_LAUNCHES,  # a GPU's host has it in EAGER_LAUNCHES
        overlaps=gpu,
        memory=torch.cuda.get_device_properties(device).total_memory if gpu else None,
        head_dim=head_dim,
        source="claa-sglang plan --measure" + ("" if shape is None else f", at the sizes of {shape.name}"),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def _bandwidth(dtype: torch.dtype, device: torch.device) -> float:
    """Bytes per second of a product with one vector, which reads a large matrix once."""
    width = 8192
    rows = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // (width * dtype.itemsize)
    matrix = torch.zeros(rows, width, dtype=dtype, device=device)
    vector = torch.zeros(width, dtype=dtype, device=device)
    return matrix.numel() * dtype.itemsize / median_seconds(lambda: matrix @ vector, device)
