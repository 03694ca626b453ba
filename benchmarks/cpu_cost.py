"""What CLAA costs and saves on SGLang's CPU engine: dense against stock, pruned against its bound and against stock.

    python -m benchmarks.cpu_cost [--quick] [--out benchmarks/results/cpu_cost.json]

Six servers live side by side and only one works at a time; every round asks each of them once, in an order that
alternates, so that a slow phase of the machine hits all of them. Every prompt is fresh random tokens and the prefix
cache is emptied between rounds: nothing is a prefix hit. A time is one whole HTTP request with one output token, as a
client sees it. Ratios are taken within a round; their median over the rounds is what is claimed.

Two processes of the same server can differ by several per cent for as long as they live, more than a dense request is
allowed to cost. So stock and CLAA have two processes each, of which a round takes the mean, and the ratio of the two
stock processes is printed as the noise.

The bound of a pruned request is early(N) + late(kN): with p = 14 of 30 layers, both halves have 15 layers, so copies of
the model cut to 15 layers and to one measure both. A request to an n-layer model takes
T_n(tokens) = c(tokens) + n * layer(tokens), where c is what a request pays once: HTTP, scheduler, embedding, head. A
pruned request pays c once too:

    early(N) = T_15(N)                                            c included
    late(kN) = 15 * layer(kN) = 15/14 * (T_15(kN) - T_1(kN))      c cancelled

Scoring, ranking, gathering, boundary states and late slots are in the pruned request and not in its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
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

import requests
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

from claa_sglang.tools import small_model
from claa_sglang.tools.servers import Server, cpu_server

ROOT = Path(__file__).resolve().parent.parent
PRUNE_LAYER, KEEP_RATE, OUTPUT_TOKENS = 14, 0.2, 33
DENSE = {"custom_params": {"claa": {"enabled": False}}}
# Chunks off, as a chunk of 2,000 or more is; an idle scheduler would otherwise spin and take a core from the others.
COMMON = ("--chunked-prefill-size", "-1", "--sleep-on-idle")
CLAA = (
    "--enable-claa",
    "--claa-profile",
    "none",
    "--claa-policy",
    "always",
    "--claa-finish",
    "off",
    "--claa-prune-layer",
    str(PRUNE_LAYER),
    "--claa-keep-rate",
    str(KEEP_RATE),
)
TARGETS = {
    "dense TTFT / stock TTFT": 1.03,
    "dense time per output token / stock": 1.03,
    "pruned / bound": 1.08,
    "pruned / stock": 0.68,
}
NOISE = "stock / stock, another process"


def main() -> int:
    """Run, print, write; the exit status is 1 when a target is missed."""
    args = parse_args()
    with contextlib.ExitStack() as stack:
        temp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="claa-cost-")))
        full = small_model.prepare(ROOT / small_model.DEFAULT_DIR)
        half, one = truncated(full, PRUNE_LAYER + 1, temp), truncated(full, 1, temp)
        common = (*COMMON, "--dtype", args.dtype)
        servers = {
            "stock": stack.enter_context(cpu_server(full, *common)),
            "claa": stack.enter_context(cpu_server(full, *common, *CLAA)),
            "claa again": stack.enter_context(cpu_server(full, *common, *CLAA)),
            "stock again": stack.enter_context(cpu_server(full, *common)),
            "half": stack.enter_context(cpu_server(half, *common)),
            "one": stack.enter_context(cpu_server(one, *common)),
        }
        samples = measure(servers, args)
    ratios = ratios_of(samples)
    print_tables(samples, ratios)
    write(args, samples, ratios)
    return int(any(statistics.median(ratios[name]) > limit for name, limit in TARGETS.items()))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--prompt-tokens", type=int, default=2000, help="tokens of every prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, at least 5 (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="two rounds: whether it runs; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_cost.json")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 2
    elif args.rounds < 5:
        parser.error("--rounds: at least 5")
    return args


def truncated(model: Path, layers: int, home: Path) -> Path:
    """A copy of `model` with its first `layers` layers only; embeddings, final norm and head as they are."""
    target = home / f"{layers}-layers"
    target.mkdir()
    for file in model.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (target / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    with safe_open(model / "model.safetensors", framework="pt") as weights:
        kept = {name: weights.get_tensor(name) for name in weights.keys() if layer_of(name) < layers}  # noqa: SIM118
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def layer_of(name: str) -> int:
    """Layer of a weight such as `model.layers.7.mlp.up_proj.weight`; -1 where it belongs to none."""
    parts = name.split(".")
    return int(parts[2]) if parts[1:2] == ["layers"] else -1


# --- timing ---


def measure(servers: dict[str, Server], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per measurement and round; the first round warms up and is not kept."""
    tokens, kept = args.prompt_tokens, int(KEEP_RATE * args.prompt_tokens)
    rng = random.Random(0)
    tasks = {
        "stock, first": lambda: ttft(servers["stock"], prompt(rng, tokens), {}),
        "stock, second": lambda: ttft(servers["stock again"], prompt(rng, tokens), {}),
        "dense, first": lambda: ttft(servers["claa"], prompt(rng, tokens), DENSE),
        "dense, second": lambda: ttft(servers["claa again"], prompt(rng, tokens), DENSE),
        "pruned": lambda: ttft(servers["claa"], prompt(rng, tokens), {}, pruned=True),
        "15 layers, N": lambda: ttft(servers["half"], prompt(rng, tokens), {}),
        "15 layers, kN": lambda: ttft(servers["half"], prompt(rng, kept), {}),
        "1 layer, kN": lambda: ttft(servers["one"], prompt(rng, kept), {}),
        "stock per token": lambda: per_token(servers["stock"], prompt(rng, tokens), {}),
        "dense per token": lambda: per_token(servers["claa"], prompt(rng, tokens), DENSE),
        "pruned per token": lambda: per_token(servers["claa"], prompt(rng, tokens), {}),
    }
    order, samples = list(tasks), defaultdict(list)
    for index in range(args.rounds + 1):
        for name in order:
            seconds = tasks[name]()
            if index:
                samples[name].append(seconds)
        for running in servers.values():
            running.flush()
        # Reversed, then rotated: no measurement keeps its place, or its neighbour.
        order = order[::-1][index % 2 :] + order[::-1][: index % 2]
    return dict(samples)


def prompt(rng: random.Random, tokens: int) -> list[int]:
    """Random ordinary tokens: what is computed does not depend on which they are."""
    return [rng.randrange(100, 49_000) for _ in range(tokens)]


def ttft(running: Server, input_ids: list[int], params: dict[str, Any], pruned: bool = False) -> float:
    """Seconds of one request with one output token."""
    sampling = {"max_new_tokens": 1, "ignore_eos": True, **params}
    start = time.perf_counter()
    answer = running.generate(input_ids=input_ids, sampling_params=sampling)
    seconds = time.perf_counter() - start
    meta = answer["meta_info"]
    if meta["cached_tokens"] or meta.get("claa", {}).get("pruned", False) != pruned:
        raise RuntimeError(f"not the request that was to be measured: {meta}")
    return seconds


def per_token(running: Server, input_ids: list[int], params: dict[str, Any]) -> float:
    """Seconds per output token after the first one, as they stream in."""
    body: Any = {
        "input_ids": input_ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True, **params},
        "stream": True,
    }
    first = last = 0.0
    with requests.post(running.url + "/generate", json=body, stream=True, timeout=600) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                last = time.perf_counter()
                first = first or last
    return (last - first) / (OUTPUT_TOKENS - 1)


# --- what it means ---


def ratios_of(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    """Each claimed ratio, once per round."""
    for kind in ("stock", "dense"):
        both = zip(samples[f"{kind}, first"], samples[f"{kind}, second"], strict=True)
        samples[kind] = [(a + b) / 2 for a, b in both]
    early, late_and_once, once = samples["15 layers, N"], samples["15 layers, kN"], samples["1 layer, kN"]
    layers = PRUNE_LAYER + 1
    samples["bound"] = [e + layers / (layers - 1) * (a - b) for e, a, b in zip(early, late_and_once, once, strict=True)]
    pairs = {
        "dense TTFT / stock TTFT": ("dense", "stock"),
        "dense time per output token / stock": ("dense per token", "stock per token"),
        "pruned / bound": ("pruned", "bound"),
        "pruned / stock": ("pruned", "stock"),
        NOISE: ("stock, second", "stock, first"),
    }
    return {
        name: [a / b for a, b in zip(samples[over], samples[under], strict=True)]
        for name, (over, under) in pairs.items()
    }


def print_tables(samples: dict[str, list[float]], ratios: dict[str, list[float]]) -> None:
    console = Console()
    times = Table("request", "median ms", "min", "max", title="one output token; 'per token': each later token")
    for name, values in samples.items():
        times.add_row(name, *(f"{1000 * x:.1f}" for x in (statistics.median(values), min(values), max(values))))
    console.print(times)
    claims = Table("ratio within a round", "median", "min", "max", "target")
    for name, values in ratios.items():
        median, limit = statistics.median(values), TARGETS.get(name)
        style = "white" if limit is None else "green" if median <= limit else "red"
        target = "the noise" if limit is None else f"at most {limit}"
        claims.add_row(name, f"[{style}]{median:.3f}", f"{min(values):.3f}", f"{max(values):.3f}", target)
    console.print(claims)


def write(args: argparse.Namespace, samples: dict[str, list[float]], ratios: dict[str, list[float]]) -> None:
    record = {
        "command": "python -m benchmarks.cpu_cost " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": args.quick,
        "model": small_model.NAME,
        "dtype": args.dtype,
        "prompt_tokens": args.prompt_tokens,
        "prune_layer": PRUNE_LAYER,
        "keep_rate": KEEP_RATE,
        "flags": [*COMMON, *CLAA],
        "versions": {name: version(name) for name in ("claa-sglang", "sglang", "torch")}
        | {"python": platform.python_version()},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "ratios": {
            name: {"median": statistics.median(v), "min": min(v), "max": max(v), "target": TARGETS.get(name)}
            for name, v in ratios.items()
        },
        "seconds": samples,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
