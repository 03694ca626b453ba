"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, as its wrapper launches it, without a GPU.

The wrappers are called with CPU tensors and their launches recorded instead of run, so that block sizes, stages and
constants are those of a real call. The interpreter accepts code that the compiler does not, and the other way round.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from claa_sglang.kernels import fold, rows, window_attention
from tests.paged import Shape, make_batch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Bytes of shared memory one program may have: sm_80, sm_90 and sm_100.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
COMMON = Shape((300,), 8, 8, 2, 128, BF16)
# Every number of query rows in a tile (16, 32, 64), every head size; the largest tiles everywhere.
CASES = [(COMMON, c) for c in SHARED] + [(Shape((300,), 64, 7, 1, 256, BF16), c) for c in SHARED]
CASES += [(Shape((300,), 8, 9, 3, 64, FP16), 90), (Shape((300,), 8, 16, 1, 96, BF16), 80)]
CASES += [(Shape((300,), 4, 4, 2, 192, FP16), 90), (Shape((300,), 1, 4, 2, 16, FP32), 90)]
CASES += [(Shape((300,), 8, 8, 1, 128, FP32), 100)]
# Keys of 8 bits: e4m3 begins with sm_89.
CASES += [(COMMON._replace(fp8_keys=True), c) for c in (90, 100)]
# The window that the server has unless told otherwise.
WINDOW = Shape((300,), 32, 8, 2, 128, BF16)
RANKERS = {"claa": (32, True), "paper": (8, False), "last": (1, False)}  # queries, peaks
Launch = tuple[JITFunction, tuple, dict]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    seen: list[Launch] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **kw: seen.append((self, args, kw)))
    yield seen


def compile_as_launched(launch: Launch, capability: int) -> Any:
    """What Triton's own launch would compile: integers of 1 are constants, multiples of 16 and pointers are marked."""
    function, args, named = launch
    names = function.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in named.items() if k in names}
    options = {k: v for k, v in named.items() if k not in names}
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(function.params):
        value = values[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[param.name], constants[(i,)] = "constexpr", value
            continue
        signature[param.name] = mangle_type(value)
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if special and not param.do_not_specialize_on_alignment and isinstance(address, int) and address % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any, tmp_path: Any) -> tuple[int, int]:
    """(registers of a thread, bytes of its local memory): spilled registers live in local memory."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([CUOBJDUMP, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return int(found[0]), int(found[1]) + int(found[2])


def check(launches: list[Launch], capability: int, tmp_path: Any) -> None:
    for launch in launches:
        compiled = compile_as_launched(launch, capability)
        assert compiled.metadata.shared <= SHARED[capability], launch[0].__name__
        registers, local = resources(compiled, tmp_path)
        print(f"{launch[0].__name__} sm_{capability}: {registers} registers, {local} bytes of local memory, "
              f"{compiled.metadata.shared} of shared")  # fmt: skip
        # fp32 products fill the registers; a real KV cache is not fp32, and a few bytes are let pass.
        most = 256 if any(isinstance(a, torch.Tensor) and a.dtype == FP32 for a in launch[1][:1]) else 0
        assert local <= most, f"{launch[0].__name__}: {registers} registers, {local} bytes spilled"


CAPABILITIES = pytest.mark.parametrize("capability", SHARED, ids="sm{}".format)


@pytest.mark.parametrize(("shape", "capability"), CASES, ids=str)
def test_window_attention(shape: Shape, capability: int, launches: list[Launch], tmp_path: Any) -> None:
    batch = make_batch(shape)
    window_attention.window_mass(
        *batch[:4], window=shape.window, scaling=0.1, max_tokens=batch.max_tokens, positions=batch.positions
    )
    assert len(launches) == 3
    # The merge is the same for every shape.
    check(launches if shape is COMMON else [launches[0], launches[2]], capability, tmp_path)


@CAPABILITIES
@pytest.mark.parametrize("ranker", RANKERS)
def test_window_attention_of_every_ranker(ranker: str, capability: int, launches: list[Launch], tmp_path: Any) -> None:
    batch, (queries, peaks) = make_batch(WINDOW), RANKERS[ranker]
    window_attention.window_mass(
        *batch[:4],
        window=32,
        scaling=0.1,
        max_tokens=batch.max_tokens,
        positions=batch.positions,
        queries=queries,
        peaks=peaks,
    )
    assert len(launches) == 3
    check(launches, capability, tmp_path)


@CAPABILITIES
@pytest.mark.parametrize("first_layer", [True, False], ids=["first", "later"])
def test_fold(first_layer: bool, capability: int, launches: list[Launch], tmp_path: Any) -> None:
    batch = make_batch(COMMON)
    mass, ranking = torch.empty(2 * batch.positions), torch.empty(batch.positions)
    fold.fold(
        mass, batch.requests, ranking, window=8, pool_kernel=7, max_tokens=batch.max_tokens, first_layer=first_layer
    )
    assert len(launches) == 2
    check(launches, capability, tmp_path)


@CAPABILITIES
@pytest.mark.parametrize("is_pair", [True, False], ids=["pair", "sum"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_rows(is_pair: bool, dtype: torch.dtype, capability: int, launches: list[Launch], tmp_path: Any) -> None:
    buffers = [torch.zeros(4, 2, 512, dtype=dtype) for _ in range(2)]
    parts, vector = rows.make_parts(buffers, [1024, 1024])
    states = torch.zeros(3, 1024 if is_pair else 2048, dtype=dtype)
    slots = torch.arange(3)
    rows.store(parts, slots, states, states, is_pair=is_pair, vector=vector)
    rows.load(parts, slots, states, states, is_pair=is_pair, vector=vector)
    assert len(launches) == 2
    check(launches, capability, tmp_path)
    if capability == 90:
        text = compile_as_launched(launches[1], 90).asm["ptx"]
        # 16 bytes at once, in and out: the alignment has reached the compiler.
        assert re.search(r"ld\.global\S*\.v4\.b32", text) and re.search(r"st\.global\S*\.v4\.b32", text)
