"""Does a model split over several GPUs keep the same tokens and give the same answers? And does it stay up?

    python -m benchmarks.tensor_parallel --model .cache/models/qwen2.5-coder-0.5b --prune-layer 9 --score-layers 7,9

Three servers with the same flags start side by side: of one rank, of one rank again, and of `--tp-size` ranks, which
compare what they keep in every forward (SGLang's own checks of every step are on there: a difference ends a request
with an error, a slot with two owners ends the server). All are asked the same prompts, dense and pruned, and graded.

Kept sets of one rank and of several differ by rounding in 16 bits, as the sums of a layer are rounded elsewhere. The
second server of one rank says how much of that is there without any split: its prompts meet others in a batch.

Then the split server gets `--requests` mixed requests, of which some hang up, while SGLang retracts some on purpose:
nobody may wait for ever, and nothing may be left behind. `--cpu` tries all of it on the CPU engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import requests
from rich.console import Console
from rich.table import Table

from benchmarks.quality.statistics import mean
from benchmarks.ttft import record
from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.generate import TASKS, generate
from claa_sglang.tasks.grade import grade
from claa_sglang.tasks.record import Prompt
from claa_sglang.tools.cpu_env import cpu_environment
from claa_sglang.tools.servers import CPU_FLAGS, ONE_THREAD, STRICT, Server, launched

ROOT = Path(__file__).resolve().parent.parent
CLAA = ("--enable-claa", "--claa-policy", "always", "--claa-min-prompt-tokens", "0", "--claa-profile", "none")
TASK_NAMES = ("needle-number", "needle-uuid", "multi-key", "multi-query", "passages", "copy-code")
# Two ranks on SGLang's CPU engine: without an NCCL library, and one core for each.
CPU_RANKS = {"SGLANG_NCCL_SO_PATH": "/nowhere/libnccl.so", "TORCH_COMPILE_DISABLE": "1"}
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
OVERLAP = 0.99  # of kept sets, on average: what the split may change at most
GONE = 0.05  # of the mixed requests, those whose client hangs up
PATIENCE = 120.0  # seconds that a mixed request may take
IN_FLIGHT = 24


class Given(NamedTuple):
    """What a server said to one prompt. kept: positions, None of a dense answer."""

    text: str
    score: float
    kept: frozenset[int] | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit status is 1 where something is not as it must be."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = list(generate(tokenizer, args.tasks, args.lengths, ["prose"], args.count, seed=50_000))
    ids = [token_ids(prompt, tokenizer) for prompt in prompts]
    device, bandwidth = record.device()
    with contextlib.ExitStack() as stack:
        servers = start(args, stack)
        say("servers are ready")
        answers = {
            name: {
                kind: ask_all(server, prompts, ids, None if kind == "dense" else args.keep_rate)
                for kind in ("dense", "pruned")
            }
            for name, server in servers.items()
        }
        say(f"{len(prompts)} prompts are answered by each")
        found: dict[str, Any] = {"compared": compared(prompts, answers)}
        found["mixed"] = mixed(servers["split"], args.requests, args.longest, seed=1)
        say(f"{args.requests} mixed requests are over")
    found["failures"] = failures(found)
    result = {
        **record.provenance([]),
        "command": "python -m benchmarks.tensor_parallel " + shlex.join(argv),
        "device": device,
        "gpu": bandwidth is not None,
        "model": args.model.name,
        "tp_size": args.tp_size,
        "keep_rate": args.keep_rate,
        "prune_layer": args.prune_layer,
        "score_layers": args.score_layers,
        **found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(msgspec.to_builtins(result), indent=1) + "\n")
    show(found)
    return int(bool(found["failures"]))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensor_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a checkpoint with a chat template")
    parser.add_argument("--tp-size", type=int, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--prune-layer", type=int, required=True, help="one that leaves room on every rank")
    parser.add_argument("--score-layers", required=True, help="as --claa-score-layers")
    parser.add_argument("--keep-rate", type=float, default=0.2, help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASK_NAMES), help="default: %(default)s")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16_384], help="tokens (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10, help="prompts of each task and length (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=300, help="mixed ones (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=12_000, help="tokens of a mixed one (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=150_000, help="--max-total-tokens (default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="on SGLang's CPU engine, to try it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tensor_parallel.json")
    return parser.parse_args(argv)


def start(args: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Server]:
    """The three servers, ready. Raises ServerFailed."""
    flags = ("--model-path", str(args.model.resolve()), *(CPU_FLAGS if args.cpu else ()), *CLAA)
    flags += ("--claa-prune-layer", str(args.prune_layer), "--claa-score-layers", args.score_layers)
    flags += ("--max-total-tokens", str(args.tokens), "--log-level", "warning")
    flags += () if args.cpu else ("--mem-fraction-static", "0.7", "--cuda-graph-max-bs-decode", "32")
    base = {**cpu_environment(), **ONE_THREAD} if args.cpu else {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    split = {**STRICT, **RETRACT, **(CPU_RANKS | cores(args.tp_size) if args.cpu else {})}
    # Comparisons are of prefixes that stay pruned; the mixed requests have theirs finished.
    found = {
        "one": stack.enter_context(launched(*flags, "--claa-finish", "off", env=base)),
        "again": stack.enter_context(launched(*flags, "--claa-finish", "off", env=base)),
        "split": stack.enter_context(launched(*flags, "--tp-size", str(args.tp_size), env=base | split)),
    }
    for server in found.values():
        server.wait()
    return found


def cores(ranks: int) -> dict[str, str]:
    return {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank) for rank in range(ranks))}


def ask_all(
    server: Server, prompts: Sequence[Prompt], ids: Sequence[list[int]], keep_rate: float | None
) -> list[Given]:
    claa: dict[str, Any] = {"enabled": False}
    if keep_rate is not None:
        claa = {"keep_rate": keep_rate, "return_kept": True, "finish": False}
    room = max(prompt.max_new_tokens or 64 for prompt in prompts)
    params = {"max_new_tokens": room, "custom_params": {"claa": claa}}

    def one(index: int) -> Given:
        answer = server.generate(input_ids=ids[index], sampling_params=params)
        kept = answer["meta_info"]["claa"].get("kept")
        prompt = prompts[index]
        score = grade(answer["text"], prompt.answers, prompt.exact)
        return Given(answer["text"], score, None if kept is None else frozenset(kept))

    server.flush()
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        return list(threads.map(one, range(len(prompts))))


def compared(prompts: Sequence[Prompt], answers: dict[str, dict[str, list[Given]]]) -> list[dict[str, Any]]:
    """For each length: kept sets, answers and accuracy of the others beside those of one rank."""
    found = []
    for length in sorted({prompt.length for prompt in prompts}):
        of = [i for i, prompt in enumerate(prompts) if prompt.length == length]
        for name in ("again", "split"):
            for kind in ("dense", "pruned"):
                pairs = [(answers["one"][kind][i], answers[name][kind][i]) for i in of]
                overlaps = [overlap(one.kept, two.kept) for one, two in pairs if one.kept and two.kept]
                row: dict[str, Any] = {
                    "length": length,
                    "server": name,
                    "kind": kind,
                    "prompts": len(of),
                    "same text": statistics.mean(one.text == two.text for one, two in pairs),
                    "accuracy of one": statistics.mean(one.score for one, _ in pairs),
                    "accuracy": statistics.mean(two.score for _, two in pairs),
                    "difference": mean(np.array([two.score - one.score for one, two in pairs])),
                }
                if overlaps:
                    row |= {"overlap": statistics.mean(overlaps), "least overlap": min(overlaps)}
                found.append(row)
    return found


def overlap(one: frozenset[int], two: frozenset[int]) -> float:
    """Share of the kept positions that both kept."""
    return len(one & two) / max(len(one), len(two))


def mixed(server: Server, count: int, longest: int, seed: int) -> dict[str, Any]:
    """Pruned, dense and undecided requests of all lengths, several at a time, over shared prefixes; some hang up."""
    rng = random.Random(seed)
    texts = [[rng.randrange(1000, 20_000) for _ in range(longest)] for _ in range(6)]
    options: list[dict[str, Any]] = [{"keep_rate": 0.2}, {"keep_rate": 0.5}, {"policy": "auto"}, {"enabled": False}]
    server.flush()
    counts: Counter[str] = Counter()
    began = time.monotonic()

    def one(index: int) -> str:
        dice = random.Random(seed * 1000 + index)
        text, length = dice.choice(texts), dice.randrange(64, longest)
        own = [dice.randrange(1000, 20_000) for _ in range(dice.randrange(16, 64))]
        params = {"temperature": 0, "max_new_tokens": dice.randrange(4, 48), "ignore_eos": True}
        body = {"input_ids": text[:length] + own, "sampling_params": params | {"custom_params": {"claa": {}}}}
        body["sampling_params"]["custom_params"]["claa"] = dice.choice(options)
        leaves = dice.random() < GONE
        time.sleep(dice.random() * 0.05)
        try:
            answer = requests.post(server.url + "/generate", json=body, timeout=dice.random() if leaves else PATIENCE)
        except requests.Timeout:
            return "hung up" if leaves else "waited for ever"
        except requests.RequestException as error:
            return type(error).__name__
        if answer.status_code != 200:
            return f"HTTP {answer.status_code}: {answer.text[:200]}"
        report = answer.json()["meta_info"]["claa"]
        return "pruned" if report["pruned"] else "dense, finished" if "finished_tokens" in report else "dense"

    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        for index, said in enumerate(threads.map(one, range(count))):
            counts[said] += 1
            if index % 100 == 99:
                say(f"{index + 1} of {count}: {dict(counts)}")
    seconds = time.monotonic() - began
    left = left_behind(server)
    finishing = server.get("/server_info").json()["claa"]["finishing"]
    retracted = server.log().count("#retracted_reqs")
    return {
        "counts": dict(counts),
        "seconds": round(seconds, 1),
        "left": left,
        "finishing": finishing,
        "retractions": retracted,
    }


def left_behind(server: Server) -> str:
    """What an idle server holds, "" if nothing: hanging up is noticed by and by."""
    deadline, left = time.monotonic() + 30, "?"
    while left and time.monotonic() < deadline:
        time.sleep(0.5)
        left = server.left_behind()
    return left


def failures(found: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    wrong = []
    for row in found["compared"]:
        if row["server"] == "split" and row.get("overlap", 1.0) < OVERLAP:
            wrong.append(f"{row['length']} tokens: kept sets overlap by {row['overlap']:.4f} on average")
        interval = row["difference"]
        if row["server"] == "split" and not interval.low <= 0 <= interval.high:
            wrong.append(f"{row['length']} tokens, {row['kind']}: accuracy differs by {interval.mean:+.3f}")
    known = {"pruned", "dense", "dense, finished", "hung up"}
    wrong += [f"{n} mixed requests: {said}" for said, n in found["mixed"]["counts"].items() if said not in known]
    missing = {"pruned", "dense", "hung up"} - set(found["mixed"]["counts"])
    wrong += [f"no mixed request was {said}" for said in sorted(missing)]
    if not found["mixed"]["retractions"]:
        wrong.append("no request was retracted")
    if found["mixed"]["left"]:
        wrong.append(f"left behind: {found['mixed']['left']}")
    return wrong


def show(found: dict[str, Any]) -> None:
    console = Console()
    table = Table("tokens", "server", "", "prompts", "overlap", "least", "same text", "accuracy of one", "accuracy")
    for row in found["compared"]:
        kept = [f"{row[name]:.4f}" if name in row else "" for name in ("overlap", "least overlap")]
        shares = [f"{100 * row[name]:.1f}" for name in ("same text", "accuracy of one", "accuracy")]
        table.add_row(str(row["length"]), row["server"], row["kind"], str(row["prompts"]), *kept, *shares)
    console.print(table)
    console.print(found["mixed"], markup=False)
    for failure in found["failures"]:
        console.print(failure, style="red", markup=False)
    console.print("[red]FAILED" if found["failures"] else "[green]nothing failed")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
