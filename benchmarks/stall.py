"""How long a long prompt holds up requests that are decoding: the longest step of its prefill, against stock's.

    python -m benchmarks.stall [--shape llama-3.1-8b] [--prompt-tokens 65536] [--out benchmarks/results/stall.json]

Two engines, stock and CLAA, live side by side and take turns. In each round a few requests decode and stream while one
long prompt is prefilled in chunks. The engines run with `--prefill-decode-interval 1`, which puts a decode step between
two prefill steps, so the longest gap in a decoding stream is the longest prefill step (and one decode step, the same in
both). It is compared with stock's longest gap for the same prompt in the same round; a request must not hold up others
for longer than 1.5 times what a stock chunk does, at any keep rate. Without a GPU this runs SmolLM2 on SGLang's CPU
engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import shapes
from benchmarks.engine import CPU_OPTIONS, enter_device, running
from claa_sglang.tools import small_model

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1.5
DECODING, DECODING_PROMPT = 4, 256  # requests that are held up, and the tokens of their prompts
CASE_SECONDS = 600
STEADY = 4  # tokens each of them has streamed before the long prompt arrives


def main() -> int:
    """Run, print, write; the exit status is 1 when a gap is longer than LIMIT times stock's."""
    args = parse_args()
    gpu = enter_device()
    with contextlib.ExitStack() as stack:
        stock, claa = start_engines(args, gpu, stack)
        gaps = measure(stock, claa, args)
    ratios = {
        name: [pruned / dense for pruned, dense in zip(values, gaps["stock"], strict=True)]
        for name, values in gaps.items()
        if name != "stock"
    }
    print_table(gaps, ratios)
    write(args, gpu, gaps, ratios)
    return int(any(statistics.median(values) > LIMIT for values in ratios.values()))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stall", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, help="random weights of this shape (default: SmolLM2)")
    parser.add_argument("--prompt-tokens", type=int, default=6000, help="of the long prompt (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, help="prefill chunk in tokens (default: %(default)s)")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.2, 0.5, 1.0], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--log-level", default="error", help="of the engines (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "stall.json")
    return parser.parse_args()


def start_engines(args: argparse.Namespace, gpu: str | None, stack: contextlib.ExitStack) -> tuple[Any, Any]:
    """(stock, CLAA), each with room for the long prompt, its late slots and what decodes."""
    options: dict[str, Any] = {
        "chunked_prefill_size": args.chunk,
        "prefill_decode_interval": 1,
        "prefill_decode_interval_min_bs": 1,
        "max_total_tokens": 3 * args.prompt_tokens + 20_000,
        "random_seed": 0,
        "log_level": args.log_level,
    }
    if args.shape is None:
        options["model_path"] = str(small_model.prepare(ROOT / small_model.DEFAULT_DIR))
    else:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options |= {"model_path": str(shapes.write(args.shape, home)), **shapes.RANDOM_WEIGHTS}
    if gpu is None:
        options |= {**CPU_OPTIONS, "dtype": "float32", "sleep_on_idle": True}
    engines = []
    claa = {"enable_claa": True, "claa_profile": "none", "claa_policy": "always", "claa_finish": "off"}
    for extra in ({}, {**claa, "claa_min_prompt_tokens": 2 * DECODING_PROMPT}):
        engine, seconds = stack.enter_context(running({**options, **extra}))
        engines.append(engine)
        print(f"engine {len(engines)} of 2 started in {seconds:.0f} s", flush=True)
    return engines[0], engines[1]


def measure(stock: Any, claa: Any, args: argparse.Namespace) -> dict[str, list[float]]:
    """Longest gap in seconds, per configuration and round; the first round warms up and is not kept."""
    rng, gaps = random.Random(0), defaultdict(list)
    cases: list[tuple[str, Any, float | None]] = [("stock", stock, None)]
    cases += [(f"keep {rate}", claa, rate) for rate in args.keep_rates]
    for index in range(args.rounds + 1):
        prompt = tokens(rng, args.prompt_tokens)
        for name, engine, rate in cases if index % 2 else cases[::-1]:
            gap = engine.loop.run_until_complete(asyncio.wait_for(longest_gap(engine, rng, prompt, rate), CASE_SECONDS))
            print(f"round {index} of {args.rounds}, {name}: {1000 * gap:.1f} ms", flush=True)
            if index:
                gaps[name].append(gap)
    return dict(gaps)


async def longest_gap(engine: Any, rng: random.Random, prompt: list[int], keep_rate: float | None) -> float:
    """Longest time without a token of a decoding request, in seconds, while `prompt` is prefilled."""
    times: list[list[float]] = [[] for _ in range(DECODING)]
    done = asyncio.Event()

    async def decode(stream: list[float]) -> None:
        params = {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}
        prompt_ids = tokens(rng, DECODING_PROMPT)
        async for _ in await engine.async_generate(input_ids=prompt_ids, sampling_params=params, stream=True):
            stream.append(time.perf_counter())
            if done.is_set():
                break  # leaving the stream aborts the request

    decoding = [asyncio.create_task(decode(stream)) for stream in times]
    while min(len(stream) for stream in times) < STEADY:
        await asyncio.sleep(0.005)
        for task in decoding:
            if task.done():
                task.result()  # an error; otherwise they go on for longer than this
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    if keep_rate is not None:
        params["custom_params"] = {"claa": {"keep_rate": keep_rate}}
    start = time.perf_counter()
    answer = await engine.async_generate(input_ids=prompt, sampling_params=params)
    end = time.perf_counter()
    if answer["meta_info"].get("claa", {}).get("pruned", False) != (keep_rate is not None):
        raise RuntimeError(f"not the request that was to be measured: {answer['meta_info']}")
    done.set()
    await asyncio.gather(*decoding)
    engine.tokenizer_manager.abort_request(abort_all=True)
    while not (await engine.tokenizer_manager.flush_cache()).success:
        await asyncio.sleep(0.05)  # until the aborted ones are gone
    during = [t for t in times[0] if start <= t <= end]
    points = [start, *during, end]
    return max(after - before for before, after in zip(points, points[1:], strict=False))


def tokens(rng: random.Random, count: int) -> list[int]:
    """Random ordinary tokens: what is computed does not depend on which they are."""
    return [rng.randrange(100, 49_000) for _ in range(count)]


def print_table(gaps: dict[str, list[float]], ratios: dict[str, list[float]]) -> None:
    table = Table("long prompt", "longest gap, median ms", "min", "max", "of stock's", "limit")
    for name, values in gaps.items():
        ratio = f"{statistics.median(ratios[name]):.2f}" if name in ratios else ""
        table.add_row(
            name,
            *(f"{1000 * x:.1f}" for x in (statistics.median(values), min(values), max(values))),
            ratio,
            str(LIMIT) if ratio else "",
        )
    Console().print(table)


def write(
    args: argparse.Namespace, gpu: str | None, gaps: dict[str, list[float]], ratios: dict[str, list[float]]
) -> None:
    record = {
        "command": "python -m benchmarks.stall " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": gpu or "CPU engine",
        "model": args.shape or small_model.NAME,
        "prompt_tokens": args.prompt_tokens,
        "chunk": args.chunk,
        "decoding": DECODING,
        "versions": {name: version(name) for name in ("claa-sglang", "sglang", "torch")},
        "limit": LIMIT,
        "ratio to stock": {
            name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in ratios.items()
        },
        "longest gap, seconds": gaps,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
