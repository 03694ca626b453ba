"""Every attention backend: the same answers as dense, decode graphs as eager, no host wait that dense lacks.

    python -m benchmarks.backends [--backends fa3 …] [--answers-only] [--schedule 15:0.4,23:0.15]
        [--decode-dense-layers 4] [--observe] [--out FILE]
    python -m benchmarks.backends --backends fa3:64 fa3+flashinfer triton:1:fp8_e4m3

A backend is named with its page size and KV type where they are not the defaults: `triton:64:fp8_e4m3`. Two that are
joined by a plus sign prefill and decode. Each runs in a process of its own, with two engines one after the other, in
bf16, `--claa-policy always` and SGLang's default CUDA graphs, but decode graphs for batches of up to four requests, so
that larger batches run eagerly.

With SmolLM2's weights (checks/answers.py):

- *keep 1*: log probabilities of some token ids, for the first tokens of prompts within a chunk and of several chunks
  (with a late prefill of several parts), pruned at keep rate 1 against dense. Their largest difference must not exceed
  the largest between two backends of the same KV type, both dense: SGLang's own noise.
- *graphs*: prompts at a low keep rate, decoded by graphs in fours and eagerly in eights, and mixed with dense ones.
  Two ways may choose different tokens only where the first two choices are closer than that noise can move them.

- *observe*: with `--observe`, a server that observes gives the dense answers and would keep what a prune keeps.

With a larger shape and random weights, on a GPU, one backend after the other (checks/prefill.py):

- *waits*: calls in which the host waits for the device, in a profiler trace of one prefill, pruned and dense. A backend
  whose plan waits (flashinfer's) does so once more for each step's late layers.
- *own*: GPU time of scoring, ranking and moving rows in that trace, as a share of the TTFT without the profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import combinations
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import shapes
from benchmarks.checks import answers, prefill
from benchmarks.engine import CPU_OPTIONS, enter_device, running
from claa_sglang.config import attention_backends
from claa_sglang.tools import small_model

ROOT = Path(__file__).resolve().parent.parent
GPU_BACKENDS, CPU_BACKENDS = attention_backends.of_device("cuda"), attention_backends.of_device("cpu")
CPU_ENGINE = {**CPU_OPTIONS, "dtype": "float32"}
OWN_SHARE = 0.01  # of TTFT, at most
AUTO = "auto"  # the KV type of the model

Results = dict[str, dict[str, Any]]  # by backend


def main() -> int:
    """Run, print, write; the exit status is 1 when something is not as it must be."""
    args = parse_args()
    gpu = enter_device()
    args.backends = args.backends or [Way.read(name) for name in (GPU_BACKENDS if gpu else CPU_BACKENDS)]
    model = str(args.model or small_model.prepare(ROOT / small_model.DEFAULT_DIR))
    with tempfile.TemporaryDirectory() as home:
        shape = str(shapes.write(args.shape, Path(home))) if gpu and not args.answers_only else None
        results = run_all(args, model, shape, lambda some: write(args, some, gpu or "CPU engine"))
    print_tables(results)
    failures = write(args, results, gpu or "CPU engine")
    for failure in failures:
        print("FAILED:", failure)
    return int(bool(failures))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint whose answers are compared (default: SmolLM2)")
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-3.1-8b", help="traced; default: %(default)s")
    parser.add_argument(
        "--backends", nargs="+", type=Way.read, metavar="NAME[+NAME][:PAGE[:KV TYPE]]", help="default: all"
    )
    parser.add_argument("--answers-only", action="store_true", help="trace nothing; as on the CPU engine")
    parser.add_argument("--observe", action="store_true", help="start a server that observes as well, one for each")
    parser.add_argument("--schedule", help="prune steps, as --claa-schedule reads them; default: one step")
    parser.add_argument(
        "--decode-dense-layers", type=int, metavar="M", help="as --claa-decode-dense-layers reads it; default: all"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "backends.json")
    return parser.parse_args()


class Way(NamedTuple):
    """How attention is computed: backends of prefill and decode, tokens of a page (0: SGLang's choice), KV type."""

    prefill: str
    decode: str
    page: int = 0
    kv: str = AUTO

    @classmethod
    def read(cls, text: str) -> Way:
        """As the command line has it. Raises argparse.ArgumentTypeError."""
        names, _, rest = text.partition(":")
        page, _, kv = rest.partition(":")
        prefill, _, decode = names.partition("+")
        if unknown := {prefill, decode or prefill} - {*GPU_BACKENDS, *CPU_BACKENDS}:
            raise argparse.ArgumentTypeError(f"{text}: no backend {', '.join(sorted(unknown))}")
        if ":" in kv or not (page or "0").isdecimal():
            raise argparse.ArgumentTypeError(f"{text}: must be NAME[+NAME][:PAGE[:KV TYPE]]")
        return cls(prefill, decode or prefill, int(page or 0), kv or AUTO)

    def __str__(self) -> str:
        names = self.prefill if self.decode == self.prefill else f"{self.prefill}+{self.decode}"
        page = f":{self.page}" if self.page or self.kv != AUTO else ""
        return names + page + (f":{self.kv}" if self.kv != AUTO else "")

    def options(self) -> dict[str, Any]:
        """Of an engine."""
        found: dict[str, Any] = {"prefill_attention_backend": self.prefill, "decode_attention_backend": self.decode}
        if self.prefill == self.decode:
            found = {"attention_backend": self.prefill}
        return found | ({"page_size": self.page} if self.page else {}) | {"kv_cache_dtype": self.kv}


def run_all(args: argparse.Namespace, model: str, shape: str | None, keep: Callable[[dict[str, Any]], None]) -> Results:
    """Results by backend; of one that failed, or whose process died, `error`. keep: called with what there is, after
    each part of a backend, so that a run that is ended early leaves what it has."""
    context, results, writes = multiprocessing.get_context("spawn"), {}, threading.Lock()
    alone = context.Lock()
    pruning = {"claa_schedule": args.schedule, "claa_decode_dense_layers": args.decode_dense_layers}

    def run(way: Way) -> None:
        # A pool each: a process that is killed breaks its own.
        with ProcessPoolExecutor(1, mp_context=context, initializer=_share, initargs=(alone,)) as pool:

            def add(work: Callable[..., dict[str, Any]], *given: Any) -> None:
                try:
                    found = pool.submit(work, way, model, *given, pruning).result()
                except Exception as error:  # noqa: BLE001 - the other backends still count
                    found = {"error": f"{type(error).__name__}: {error}"}
                with writes:
                    results[str(way)] = {**results.get(str(way), {}), **found}
                    keep(results)

            add(measure, shape)
            if args.observe and "error" not in results[str(way)]:
                add(observe, results[str(way)]["ranked"])

    with ThreadPoolExecutor(len(args.backends)) as threads:
        for done in [threads.submit(run, way) for way in args.backends]:
            done.result()
    return {str(way): results[str(way)] for way in args.backends}


_alone: Lock


def _share(alone: Lock) -> None:
    """In a worker: the lock under which one of them is timed."""
    global _alone
    _alone = alone


def measure(way: Way, model: str, shape: str | None, pruning: dict[str, Any]) -> dict[str, Any]:
    """Everything of one backend but `observe`. shape: None for no trace. pruning: options of every engine."""
    name = str(way)
    with engine_of(way, pruning, small(way, model)) as engine:
        found: dict[str, Any] = {"ranked": answers.ranked(engine, observes=False)}
        found |= {"keep 1": answers.keep_one(engine), "graphs": answers.decoding(engine)}
        difference = answers.largest(found["keep 1"]["dense"], found["keep 1"]["keep 1"])
        say(name, f"keep 1 - dense: {difference:.2g}; equal tokens: {found['keep 1']['tokens']}")
        for kind, apart in found["graphs"].items():
            say(name, f"{kind}: {apart}")
        # The first engine of a machine compiles the kernels.
        found["startup seconds, first engine"] = engine.get_server_info()["claa"]["startup_parts"]
        found["KV type"] = way.kv
        found["late slots held"] = engine.get_server_info()["claa"]["late_slots"]["held"]
    found["prefill"] = {}
    if shape is None:
        return found
    with engine_of(way, pruning, {"model_path": shape, **shapes.RANDOM_WEIGHTS, **prefill.OPTIONS}) as engine, _alone:
        for length in prefill.LENGTHS:
            found["prefill"][str(length)] = prefill.measure(engine, length)
            for kind, seen in found["prefill"][str(length)].items():
                say(name, f"prefill of {length}, {kind}: {seen['ttft seconds']:.4f} s, waits {seen['waits']}")
        found["startup seconds"] = engine.get_server_info()["claa"]["startup_parts"]
    return found


def observe(way: Way, model: str, ranked: list[answers.Seen], pruning: dict[str, Any]) -> dict[str, Any]:
    """A server that observes, held against `ranked` of one that prunes."""
    with engine_of(way, {**pruning, "claa_mode": "observe"}, small(way, model)) as engine:
        found = answers.observing(ranked, answers.ranked(engine, observes=True))
    say(str(way), f"observe: {found}")
    return {"observe": found}


def small(way: Way, model: str) -> dict[str, Any]:
    """Options of an engine of the model whose answers are compared."""
    return {"model_path": model, **answers.OPTIONS, **(CPU_ENGINE if way.prefill in CPU_BACKENDS else {})}


@contextlib.contextmanager
def engine_of(way: Way, pruning: dict[str, Any], options: dict[str, Any]) -> Any:
    """An engine with this attention backend, shut down at the end."""
    own = {**pruning, "random_seed": 1, "log_level": "warning", **way.options()}
    with running({**options, **own}) as (engine, seconds):
        say(str(way), f"started in {seconds:.0f} s")
        yield engine


def say(name: str, text: str) -> None:
    print(f"{name}: {text}", flush=True)


# --- verdict ------------------------------------------------------------------------------------------------------


def noise(results: dict[str, Any]) -> dict[str, float]:
    """Largest difference between two backends, both dense, of each KV type that two or more have."""
    dense: dict[str, list[Any]] = defaultdict(list)
    for found in results.values():
        if "error" not in found:
            dense[found["KV type"]].append(found["keep 1"]["dense"])
    pairs = {kv: [answers.largest(a, b) for a, b in combinations(tables, 2)] for kv, tables in dense.items()}
    return {kv: max(differences) for kv, differences in pairs.items() if differences}


def verdict(results: dict[str, Any], limits: dict[str, float], steps: int = 1) -> list[str]:
    """What is not as it must be, in words. limits: what `noise` says; steps: prunes."""
    failures = []
    if 0 in limits.values():
        failures.append("two backends never differ: these answers do not depend on attention, and show nothing")
    for name, found in results.items():
        if "error" in found:
            failures.append(f"{name}: {found['error']}")
            continue
        if (limit := limits.get(found["KV type"])) is not None:
            failures += [f"{name}: {text}" for text in beyond(found, limit)]
        if observed := found.get("observe"):
            failures += [f"{name}: {text}" for text in unlike(observed)]
        if found["late slots held"]:
            failures.append(f"{name}: {found['late slots held']} late slots held at the end")
        for length, kinds in found["prefill"].items():
            more = sum(kinds["pruned"]["waits"].values()) - sum(kinds["dense"]["waits"].values())
            if more > steps * plan_waits(kinds["dense"]["waits"], int(length)):
                failures.append(f"{name}: pruned, {length} tokens: {more} host waits more than dense")
            if kinds["pruned"]["own share"] > OWN_SHARE:
                failures.append(f"{name}: {length} tokens: own GPU time is {kinds['pruned']['own share']:.1%} of TTFT")
    return failures


def beyond(found: dict[str, Any], limit: float) -> list[str]:
    """What differs by more than noise explains; a token may where both of its first two choices move by `limit`."""
    difference = answers.largest(found["keep 1"]["dense"], found["keep 1"]["keep 1"])
    failures = []
    if difference > limit:
        failures.append(f"keep rate 1 differs from dense by {difference:.2g}, stock's backends by {limit:.2g}")
    for way, apart in found["graphs"].items():
        gaps = [gap for gap in apart["gap"] if gap is not None]
        if max(gaps, default=0) > 2 * limit:
            failures.append(f"{way}: another token, where the first choice leads by {max(gaps):.2g}")
    return failures


def unlike(observed: dict[str, list[Any]]) -> list[str]:
    """What of a server that observes is not stock's answer, or not the pruned server's ranking."""
    failures = []
    if min(observed["equal"]) < answers.DECODED or max(observed["difference"]):
        failures.append(f"observing answers differ: {observed['equal']} tokens equal, by {observed['difference']}")
    if min(observed["kept by both"]) < 1:
        failures.append(f"observing would keep other tokens: {observed['kept by both']} are the same")
    return failures


def plan_waits(dense: dict[str, int], tokens: int) -> int:
    """Waits of one plan of stock's: what all its forwards wait, by the number of forwards."""
    return dense.get("cudaStreamSynchronize", 0) // -(-tokens // prefill.CHUNK)


def print_tables(results: dict[str, Any]) -> None:
    table = Table("backend", "keep 1 - dense", "dense - dense of others", "tokens equal", "own share of TTFT", "waits")
    for name, found in results.items():
        if "error" in found:
            table.add_row(name, found["error"])
            continue
        dense = found["keep 1"]["dense"]
        others = [
            answers.largest(dense, other["keep 1"]["dense"])
            for another, other in results.items()
            if another != name and "error" not in other and other["KV type"] == found["KV type"]
        ]
        traced = found["prefill"].items()
        table.add_row(
            name,
            f"{answers.largest(dense, found['keep 1']['keep 1']):.2g}",
            f"{max(others):.2g}" if others else "",
            f"{found['keep 1']['tokens']} of {answers.NEW_TOKENS}",
            ", ".join(f"{length}: {kinds['pruned']['own share']:.2%}" for length, kinds in traced),
            ", ".join(f"{length}: {kinds['pruned']['waits']} / {kinds['dense']['waits']}" for length, kinds in traced),
        )
    console = Console(width=200)
    console.print(table)
    for name, found in results.items():
        for way, apart in found.get("graphs", {}).items():
            console.print(f"{name}: {way}: equal tokens of {answers.DECODED}: {apart['equal']}, gaps {apart['gap']}")


def write(args: argparse.Namespace, results: Results, device: str) -> list[str]:
    """Write what there is; returns what is not as it must be."""
    limits = noise(results)
    failures = verdict(results, limits, steps=len(args.schedule.split(",")) if args.schedule else 1)
    record = {
        "command": "python -m benchmarks.backends " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "answers": {
            "model": args.model.name if args.model else small_model.NAME,
            "chunk": answers.CHUNK,
            "keep 1": answers.LENGTHS,
            "decoded": answers.DECODE_LENGTHS,
        },
        "traced": {"shape": args.shape, "chunk": prefill.CHUNK, "prompts": prefill.LENGTHS}
        if any(found.get("prefill") for found in results.values())
        else None,
        "versions": {name: version(name) for name in ("claa-sglang", "sglang", "torch", "triton")},
        "largest difference of two backends, both dense": limits,
        "failures": failures,
        "backends": {name: _on_record(found) for name, found in results.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return failures


def _on_record(found: dict[str, Any]) -> dict[str, Any]:
    """Without what is long: of the tables of log probabilities, what they differ by."""
    found = {name: value for name, value in found.items() if name != "ranked"}
    if "keep 1" not in found:
        return found
    tables = found["keep 1"]
    difference = answers.largest(tables["dense"], tables["keep 1"])
    return {
        **found,
        "keep 1": {"tokens": tables["tokens"]},
        "largest difference, keep 1 and dense": difference,
    }


if __name__ == "__main__":
    raise SystemExit(main())
