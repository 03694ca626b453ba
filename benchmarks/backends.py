"""Every attention backend, on a GPU: the same answers as dense, decode graphs as eager, no host wait that dense lacks.

    python -m benchmarks.backends [--shape llama-3.1-8b] [--backends fa3 …] [--schedule 15:0.4,23:0.15] [--out FILE]

One engine per backend, each in a process of its own, side by side on one GPU; SGLang's default CUDA graphs, but decode
graphs for batches of up to four requests, so that larger batches run eagerly. With `--claa-policy always`, in bf16 with
random weights. In each engine:

- *keep 1*: log probabilities of some token ids, for the first tokens of prompts within a chunk and of several chunks
  (with a late prefill of several parts), pruned at keep rate 1 against dense. Their largest difference must not exceed
  the largest between two backends, both dense: SGLang's own noise.
- *graphs*: prompts at a low keep rate, decoded by graphs in fours and eagerly in eights, and mixed with dense ones.
- *waits*: calls in which the host waits for the device, in a profiler trace of one prefill, pruned and dense.
- *own*: GPU time of scoring, ranking and moving rows in that trace, as a share of the TTFT without the profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import shapes, trace

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("fa3", "flashinfer", "triton")
CHUNK = 8192
GRAPH_BATCH = 4
NEW_TOKENS = 8  # of the prompts whose log probabilities are compared
DECODED = 32  # of the prompts whose tokens are compared
LENGTHS = (1500, 4000, 9000, 20_000)
DECODE_LENGTHS = tuple(range(2000, 2000 + 8 * 37, 37))
PROFILED = (10_240, 32_768)
ROUNDS = 5
DENSE = {"enabled": False}


def main() -> int:
    """Run, print, write; the exit status is 1 when something is not as it must be."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as home:
        path = str(shapes.write(args.shape, Path(home)))
        results = run_all(args.backends, path, args.schedule)
    failures = verdict(results)
    print_tables(results)
    write(args, results, failures)
    for failure in failures:
        print("FAILED:", failure)
    return int(bool(failures))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-3.1-8b", help="default: %(default)s")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: all")
    parser.add_argument("--schedule", help="prune steps, as --claa-schedule reads them; default: one step")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "backends.json")
    return parser.parse_args()


def run_all(backends: list[str], path: str, schedule: str | None) -> dict[str, Any]:
    """Results by backend; of one that failed, or whose process died, `error`."""
    context, results = multiprocessing.get_context("spawn"), {}
    with contextlib.ExitStack() as stack:
        # A pool each: a process that is killed breaks its own.
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in backends]
        started = [pool.submit(measure, name, path, schedule) for pool, name in zip(pools, backends, strict=True)]
        for name, work in zip(backends, started, strict=True):
            try:
                results[name] = work.result()
            except Exception as error:  # noqa: BLE001 - the other backends still count
                results[name] = {"error": f"{type(error).__name__}: {error}"}
    return results


def measure(name: str, path: str, schedule: str | None) -> dict[str, Any]:
    import sglang

    from claa_sglang import refusals

    # What is refused until this benchmark has shown it.
    refusals.RULES = tuple(rule for rule in refusals.RULES if rule.id != "decode-cuda-graph-flashinfer")
    started = time.perf_counter()
    engine = sglang.Engine(
        model_path=path,
        **shapes.RANDOM_WEIGHTS,
        attention_backend=name,
        chunked_prefill_size=CHUNK,
        # Engines start side by side and see what the others have taken: the pool is given, not measured.
        max_total_tokens=2 * max(PROFILED) + 20_000,
        mem_fraction_static=0.95,  # a margin that each engine leaves would be taken off what the others find
        cuda_graph_max_bs_decode=GRAPH_BATCH,
        enable_claa=True,
        claa_policy="always",
        claa_schedule=schedule,
        random_seed=1,
        log_level="warning",
    )
    say = lambda text: print(f"{name}: {text}", flush=True)  # noqa: E731
    say(f"started in {time.perf_counter() - started:.0f} s")
    try:
        found: dict[str, Any] = {"logprobs": compare_logprobs(engine), "graphs": compare_decoding(engine)}
        say(f"answers compared: {found['graphs']}, equal at keep rate 1: {found['logprobs']['tokens']} of {NEW_TOKENS}")
        say(f"keep 1 - dense: {largest(found['logprobs']['dense'], found['logprobs']['keep 1']):.2g}")
        found["prefill"] = {}
        for length in PROFILED:
            found["prefill"][str(length)] = profile(engine, length)
            say(f"prefill of {length}: {found['prefill'][str(length)]}")
        info = engine.get_server_info()["claa"]
        found["late slots held"] = info["late_slots"]["held"]
        found["startup seconds"] = info["startup_parts"]
        say("done")
    finally:
        engine.shutdown()
    return found


_source = random.Random(0)


def fresh(length: int, rng: random.Random = _source) -> list[int]:
    """A prompt nobody has sent before."""
    return [rng.randrange(1000, 100_000) for _ in range(length)]


def params(new: int, claa: dict[str, Any]) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": new, "ignore_eos": True, "custom_params": {"claa": claa}}


# --- keep rate 1 --------------------------------------------------------------------------------------------------


def compare_logprobs(engine: Any) -> dict[str, Any]:
    """Log probabilities of fixed ids at the first token of each prompt, dense and at keep rate 1, `[prompts, ids]`.

    Dense ones are compared with other backends' by the caller. `tokens`: equal tokens of those generated, per prompt.
    """
    ids = random.Random(1).sample(range(100_000), 256)
    found: dict[str, Any] = {"dense": [], "keep 1": [], "tokens": []}
    for index, length in enumerate(LENGTHS):
        prompt = fresh(length, random.Random(100 + index))  # the same in every backend
        tokens = {}
        for kind, claa in (("dense", DENSE), ("keep 1", {"keep_rate": 1.0})):
            answer = engine.generate(
                input_ids=prompt,
                sampling_params=params(NEW_TOKENS, claa),
                return_logprob=True,
                logprob_start_len=-1,
                token_ids_logprob=ids,
            )
            first = answer["meta_info"]["output_token_ids_logprobs"][0]
            found[kind].append([value for value, *_ in first])
            tokens[kind] = answer["output_ids"]
        found["tokens"].append(sum(a == b for a, b in zip(tokens["dense"], tokens["keep 1"], strict=True)))
    return found


def largest(left: list[list[float]], right: list[list[float]]) -> float:
    """Largest absolute difference of two tables of log probabilities."""
    rows = zip(left, right, strict=True)
    return max(abs(a - b) for x, y in rows for a, b in zip(x, y, strict=True))


# --- decode graphs ------------------------------------------------------------------------------------------------


def compare_decoding(engine: Any) -> dict[str, list[int]]:
    """Equal tokens, of DECODED per prompt, of each way against decoding alone in a graph."""
    prompts = [fresh(length) for length in DECODE_LENGTHS]
    pruned = params(DECODED, {"keep_rate": 0.3})
    kinds = [pruned if i % 2 == 0 else params(DECODED, DENSE) for i in range(len(prompts))]
    alone = [tokens_of(engine, [prompt], [kind])[0] for prompt, kind in zip(prompts, [pruned] * 8, strict=True)]
    mixed_alone = [tokens_of(engine, [prompt], [kind])[0] for prompt, kind in zip(prompts, kinds, strict=True)]
    fours = [t for i in (0, 4) for t in tokens_of(engine, prompts[i : i + 4], [pruned] * 4)]
    eights = tokens_of(engine, prompts, [pruned] * 8)
    mixed_fours = [t for i in (0, 4) for t in tokens_of(engine, prompts[i : i + 4], kinds[i : i + 4])]
    mixed_eights = tokens_of(engine, prompts, kinds)
    dense = [params(DECODED, DENSE)] * 8
    dense_alone = [tokens_of(engine, [prompt], dense[:1])[0] for prompt in prompts]
    return {
        "pruned, fours in a graph": equal(alone, fours),
        "pruned, eights eagerly": equal(alone, eights),
        "mixed, fours in a graph": equal(mixed_alone, mixed_fours),
        "mixed, eights eagerly": equal(mixed_alone, mixed_eights),
        "dense, eights eagerly": equal(dense_alone, tokens_of(engine, prompts, dense)),  # stock's own noise
    }


def tokens_of(engine: Any, prompts: list[list[int]], kinds: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["output_ids"] for answer in engine.generate(input_ids=prompts, sampling_params=kinds)]


def equal(left: list[list[int]], right: list[list[int]]) -> list[int]:
    """Tokens before the first that differs, per prompt."""
    counts = []
    for a, b in zip(left, right, strict=True):
        counts.append(next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)))
    return counts


# --- the trace of a prefill ---------------------------------------------------------------------------------------


def profile(engine: Any, length: int) -> dict[str, Any]:
    """TTFT, host waits and CLAA's own GPU time of a prefill of `length` tokens, pruned at 0.2 and dense."""
    found: dict[str, Any] = {}
    for kind, claa in (("pruned", {"keep_rate": 0.2}), ("dense", DENSE)):
        times = []
        for _ in range(ROUNDS + 2):
            start = time.perf_counter()
            engine.generate(input_ids=fresh(length), sampling_params=params(1, claa))
            times.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as directory:
            engine.start_profile(output_dir=directory, activities=["CPU", "GPU"])
            engine.generate(input_ids=fresh(length), sampling_params=params(1, claa))
            engine.stop_profile()
            events = trace.read(wait_for_trace(Path(directory)))
        ttft = statistics.median(times[2:])
        own = trace.own_seconds(events)
        found[kind] = {"ttft seconds": ttft, "waits": trace.waits(events), "own seconds": own}
        found[kind]["own share"] = sum(own.values()) / ttft
    return found


def wait_for_trace(directory: Path) -> Path:
    """The scheduler writes its trace when it gets around to it."""
    for _ in range(600):
        if files := list(directory.rglob("*.trace.json.gz")):
            size = -1
            while size != (size := files[0].stat().st_size):
                time.sleep(0.5)
            return files[0]
        time.sleep(0.1)
    raise TimeoutError(f"no trace in {directory} after a minute")


# --- verdict ------------------------------------------------------------------------------------------------------


def noise(results: dict[str, Any]) -> float | None:
    """Largest difference between two backends, both dense; None with fewer than two."""
    dense = [found["logprobs"]["dense"] for found in results.values() if "error" not in found]
    return max((largest(a, b) for a, b in combinations(dense, 2)), default=None)


def verdict(results: dict[str, Any]) -> list[str]:
    """What is not as it must be, in words."""
    failures, limit = [], noise(results)
    for name, found in results.items():
        if "error" in found:
            failures.append(f"{name}: {found['error']}")
            continue
        difference = largest(found["logprobs"]["dense"], found["logprobs"]["keep 1"])
        if limit is not None and difference > limit:
            failures.append(
                f"{name}: keep rate 1 differs from dense by {difference:.2g}, stock's backends by {limit:.2g}"
            )
        if found["late slots held"]:
            failures.append(f"{name}: {found['late slots held']} late slots held at the end")
        for length, kinds in found["prefill"].items():
            more = sum(kinds["pruned"]["waits"].values()) - sum(kinds["dense"]["waits"].values())
            if more > 0:
                failures.append(f"{name}: pruned, {length} tokens: {more} host waits more than dense")
            if kinds["pruned"]["own share"] > 0.01:
                failures.append(f"{name}: {length} tokens: own GPU time is {kinds['pruned']['own share']:.1%} of TTFT")
    return failures


def print_tables(results: dict[str, Any]) -> None:
    table = Table("backend", "keep 1 - dense", "dense - dense of others", "tokens equal", "own share of TTFT", "waits")
    for name, found in results.items():
        if "error" in found:
            table.add_row(name, found["error"])
            continue
        dense = found["logprobs"]["dense"]
        others = [largest(dense, o["logprobs"]["dense"]) for n, o in results.items() if n != name and "error" not in o]
        prefill = found["prefill"].items()
        table.add_row(
            name,
            f"{largest(dense, found['logprobs']['keep 1']):.2g}",
            f"{max(others):.2g}" if others else "",
            f"{found['logprobs']['tokens']} of {NEW_TOKENS}",
            ", ".join(f"{length}: {kinds['pruned']['own share']:.2%}" for length, kinds in prefill),
            ", ".join(f"{length}: {kinds['pruned']['waits']} / {kinds['dense']['waits']}" for length, kinds in prefill),
        )
    console = Console(width=200)
    console.print(table)
    for name, found in results.items():
        for what, counts in found.get("graphs", {}).items():
            console.print(f"{name}: {what}: equal tokens of {DECODED}: {counts}")


def write(args: argparse.Namespace, results: dict[str, Any], failures: list[str]) -> None:
    import torch

    for found in results.values():
        if "error" not in found:
            logprobs = found["logprobs"]
            found["largest difference, keep 1 and dense"] = largest(logprobs["dense"], logprobs["keep 1"])
    limit = noise(results)
    for found in results.values():
        if "error" not in found:
            del found["logprobs"]["dense"], found["logprobs"]["keep 1"]  # 256 numbers a prompt
    record = {
        "command": "python -m benchmarks.backends " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": torch.cuda.get_device_name(),
        "model": f"{args.shape}, random weights, bf16, chunk {CHUNK}",
        "versions": {name: version(name) for name in ("claa-sglang", "sglang", "torch", "triton")},
        "prompts": {"logprobs": LENGTHS, "decode": DECODE_LENGTHS, "profiled": PROFILED},
        "largest difference of two backends, both dense": limit,
        "failures": failures,
        "backends": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
