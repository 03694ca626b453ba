"""First numbers and answers on a GPU: TTFT and decoding of one server, and whether pruned answers hold together.

    python -m benchmarks.gpu_check claa|stock graphs|eager [fa3|flashinfer|triton]

Llama-3.1-8B shape with random weights (no checkpoint is needed): bf16, chunks of 8,192 tokens. One engine per run.
TTFT is a whole request with one output token on fresh random tokens: two to warm up, median, least and most of five.
Time per output token is the difference between 73 and 9 tokens for a batch of eight whose prompts are cached, divided
by 64: median of three. `claa` also compares greedy answers of a batch of five: keep rate 1 against dense, and the two
kinds in one batch against each kind alone. This is a check with a stopwatch: the benchmark that a sceptic would accept,
interleaved with stock and beside its bound, is not this script.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import shapes

TTFT_LENGTHS, DECODE_LENGTHS = (2048, 10240, 32768), (512, 16384, 32768)
PARTED = (20_000, 9000, 26_001)  # at keep rates 1 and 0.6 and chunks of 8,192
DENSE = {"enabled": False}


def main(kind: str, graphs: str, backend: str = "fa3") -> None:
    import sglang

    with tempfile.TemporaryDirectory() as home:
        options: dict[str, Any] = {
            "model_path": str(shapes.write("llama-3.1-8b", Path(home))),
            **shapes.RANDOM_WEIGHTS,
            "attention_backend": backend,
            "chunked_prefill_size": 8192,
            "mem_fraction_static": 0.8,
            "context_length": 131072,
            "random_seed": 1,
            "log_level": "warning",
        }
        if graphs == "eager":
            options["disable_cuda_graph"] = True
        if kind == "claa":
            options |= {"enable_claa": True, "claa_policy": "always", "claa_keep_rate": 0.2}
        started = time.time()
        engine = sglang.Engine(**options)
        print("start", round(time.time() - started, 1), "s", flush=True)
        modes: dict[str, Any] = {"pruned": None, "dense": DENSE} if kind == "claa" else {"stock": None}
        for length in TTFT_LENGTHS:
            for mode, claa in modes.items():
                for _ in range(2):
                    ask(engine, fresh(length), 1, claa)
                times = [ask(engine, fresh(length), 1, claa)[0] * 1e3 for _ in range(5)]
                report("TTFT ms", mode, length, times)
        for length in DECODE_LENGTHS:
            for mode, claa in modes.items():
                prompts = [fresh(length) for _ in range(8)]
                ask(engine, prompts, 2, claa)
                times = []
                for _ in range(3):
                    short, long = ask(engine, prompts, 9, claa)[0], ask(engine, prompts, 73, claa)[0]
                    times.append((long - short) / 64 * 1e3)
                report("batch 8, ms per output token", mode, length, times)
        if kind == "claa":
            compare(engine)
        engine.shutdown()


def compare(engine: Any) -> None:
    """Equal tokens, of 48 per request: keep rate 1 and dense; mixed batch and each kind alone."""
    for what, lengths in (("within a chunk", range(3000, 3185, 37)), ("late prefills of several parts", PARTED)):
        print(what, list(lengths))
        compare_lengths(engine, lengths)
    print("late slots:", engine.get_server_info()["claa"]["late_slots"], flush=True)


def compare_lengths(engine: Any, lengths: Iterable[int]) -> None:
    prompts = [fresh(length) for length in lengths]
    tokens = {
        name: [a["output_ids"] for a in ask(engine, prompts, 48, claa)[1]]
        for name, claa in (("dense", DENSE), ("all", {"keep_rate": 1.0}), ("pruned", {"keep_rate": 0.6}))
    }
    kinds = ["pruned" if i % 2 == 0 else "dense" for i in range(len(prompts))]
    params = [sampling(48, DENSE if kind == "dense" else {"keep_rate": 0.6}) for kind in kinds]
    mixed = [a["output_ids"] for a in engine.generate(input_ids=prompts, sampling_params=params)]
    print("keep 1 = dense:", [equal(a, b) for a, b in zip(tokens["all"], tokens["dense"], strict=True)])
    print("mixed = alone:", [equal(m, tokens[kind][i]) for i, (m, kind) in enumerate(zip(mixed, kinds, strict=True))])


def sampling(new: int, claa: Any) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    return params if claa is None else {**params, "custom_params": {"claa": claa}}


def ask(engine: Any, prompts: Any, new: int, claa: Any) -> tuple[float, Any]:
    """(seconds, answer) of one call."""
    started = time.perf_counter()
    answer = engine.generate(input_ids=prompts, sampling_params=sampling(new, claa))
    return time.perf_counter() - started, answer


_source = random.Random(0)


def fresh(length: int) -> list[int]:
    """A prompt nobody has sent before."""
    return [_source.randrange(1000, 120000) for _ in range(length)]


def equal(a: list[int], b: list[int]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def report(what: str, mode: str, length: int, times: list[float]) -> None:
    middle, low, high = statistics.median(times), min(times), max(times)
    print(f"{what:30} {mode:7} {length:6} tokens: {middle:8.2f}  ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
