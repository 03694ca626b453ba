"""Whether a pruned server stays as it is: mixed traffic for half an hour, its memory and its slots sampled throughout.

    python -m benchmarks.soak --minutes 30 [--out benchmarks/results/soak.json]

The server and the client are those of `benchmarks.load`: too small a pool, forced retractions, strict accounting in
every step, 5 % of the requests given up. A round is shared prefixes, random prompts and chats whose turns grow, each
with prompts on both sides of the pruning threshold; after it comes a pause, in which the server makes pruned prefixes
dense, then nothing may be held, and the prefix cache is emptied.
Every 10 seconds the resident memory of the server's processes, the late slots held and the free slots are noted.

The memory is called flat by the slope of the scheduler's, least squares over the last two thirds of the samples, with
the 95 % confidence interval that independent samples would give it. Samples of memory are not independent, so read it
beside the growth in MiB. The exit status is 1 if a request failed, a slot stayed behind, or the interval is above 0 and
the line rises by more than 5 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import requests
from rich.console import Console
from rich.table import Table
from scipy import stats
from tqdm import tqdm

from benchmarks.traffic import MODELS, Call, Client, leaks, pressed_server, provenance, retractions
from claa_sglang.tools.servers import Server

RESULT = Path(__file__).resolve().parent / "results" / "soak.json"
EVERY = 10.0  # seconds
PAUSE = 2.0  # seconds after each round, in which the server finishes pruned prefixes
GROWTH_LIMIT = 0.05  # of the scheduler's memory, over the last two thirds
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="claa-soak-") as temp, pressed_server(args.model, Path(temp)) as running:
        client = Client(running, Path(temp, "client.log"), args.seed, progress=False)
        with Sampler(running) as sampler:
            measured = soak(running, client, sampler, 60 * args.minutes)
        measured["counts"] |= {f"retracted: {why}": n for why, n in retractions(running.log()).items()}
        if measured["failures"]:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.with_suffix(".server.log").write_text(running.log())
    measured["memory"] = {kind: growth(sampler.samples, kind) for kind in sampler.processes}
    scheduler = measured["memory"]["scheduler"]
    if not measured["counts"].get("prefixes finished"):
        measured["failures"].append("nothing was shown: no prefix was finished")
    if "slope, 95 % confidence" not in scheduler:
        measured["failures"].append(f"nothing was shown: {scheduler['samples']} samples of memory")
    if scheduler["surely grows"] and scheduler["growth of the last two thirds, share"] > GROWTH_LIMIT:
        measured["failures"].append(f"the scheduler grows: {scheduler}")
    show(measured)
    record = {**provenance("benchmarks.soak", argv), "model": args.model, "seed": args.seed, **measured}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**record, "samples": sampler.samples}, indent=1) + "\n")
    return int(bool(measured["failures"]))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of traffic (default: %(default)s)")
    parser.add_argument("--model", default=MODELS[0], choices=MODELS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: %(default)s")
    return parser.parse_args(argv)


def soak(running: Server, client: Client, sampler: Sampler, seconds: float) -> dict[str, Any]:
    """Rounds of traffic for at least `seconds`; the last one is finished. Stops at the first failure."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    began, shown = time.monotonic(), 0.0
    with tqdm(total=round(seconds), unit="s", desc="soak") as bar:
        while not failures and (elapsed := time.monotonic() - began) < seconds:
            bar.update(round(min(elapsed, seconds) - shown))
            shown = round(min(elapsed, seconds))
            bar.set_postfix(requests=counts["requests"], MiB=sampler.last("scheduler"))
            calls = traffic_round(client)
            counts.update(count(calls))
            counts["rounds"] += 1
            sampler.requests = counts["requests"]
            failures += [f"{call.rid}: {call.wrong.strip()[-500:]}" for call in calls if call.wrong]
            time.sleep(PAUSE)
            finished = running.get("/server_info").json()["claa"]["finishing"]
            counts |= {f"prefixes {what}": finished[what] for what in ("finished", "dropped")}  # type: ignore[operator]
            if leaked := leaks(running):
                failures.append(f"left behind in round {counts['rounds']}: {leaked}")
    return {"minutes": (time.monotonic() - began) / 60, "counts": dict(counts), "failures": failures}


def traffic_round(client: Client) -> list[Call]:
    """About a hundred requests, fresh ones every time."""
    shared = ("--dataset-name", "generated-shared-prefix", "--gsp-range-ratio", "0.4")
    calls = client.run(
        *shared,
        *("--gsp-num-groups", "4", "--gsp-prompts-per-group", "10"),
        *("--gsp-system-prompt-len", "450", "--gsp-question-len", "80", "--gsp-output-len", "40"),
    )
    calls += client.run(
        *("--dataset-name", "random-ids", "--tokenize-prompt", "--num-prompts", "40"),
        *("--random-input-len", "600", "--random-output-len", "48", "--random-range-ratio", "0.1"),
    )
    return calls + client.run(
        *shared,
        *("--gsp-num-groups", "2", "--gsp-prompts-per-group", "4", "--gsp-num-turns", "3"),
        *("--gsp-system-prompt-len", "200", "--gsp-question-len", "80", "--gsp-output-len", "24"),
        backend="sglang-oai-chat",
    )


def count(calls: Sequence[Call]) -> Counter[str]:
    found = Counter(requests=len(calls), errors=sum(bool(call.wrong) for call in calls))
    for call in calls:
        if call.abort and not call.complete:
            found[f"given up: {call.abort}"] += 1
        elif not call.params:
            found["answered, chat"] += 1
        else:
            found["answered, pruned" if call.report.get("pruned") else "answered, dense"] += 1
    return found


# --- memory ---


class Sampler(threading.Thread):
    """Notes a server's memory and slots every few seconds, from its start to its end."""

    def __init__(self, running: Server):
        super().__init__(daemon=True)
        self.server = running
        self.samples: list[dict[str, float]] = []
        self.requests = 0
        self.processes = {"http": psutil.Process(running.process.pid)}
        for child in self.processes["http"].children(recursive=True):
            title = " ".join(child.cmdline())
            for kind in ("scheduler", "detokenizer"):
                if title.startswith(f"sglang::{kind}"):
                    self.processes[kind] = child
        self._began = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(EVERY):
            sample: dict[str, float] = {"seconds": round(time.monotonic() - self._began, 1), "requests": self.requests}
            with contextlib.suppress(psutil.Error, requests.RequestException, KeyError):
                sample |= {kind: process.memory_info().rss / MIB for kind, process in self.processes.items()}
                slots = self.server.get("/server_info").json()["claa"]["late_slots"]
                sample |= {"late slots held": slots["held"], "slots free": slots["free"]}
            self.samples.append(sample)

    def last(self, kind: str) -> int:
        return round(self.samples[-1].get(kind, 0)) if self.samples else 0


def growth(samples: Sequence[dict[str, float]], kind: str) -> dict[str, Any]:
    """How the memory of one process went, in MiB: over all samples, and as a line through the last two thirds."""
    points = [(sample["seconds"] / 60, sample[kind]) for sample in samples if kind in sample]
    late = points[len(points) // 3 :]
    found: dict[str, Any] = {
        "samples": len(points),
        "first": points[0][1] if points else None,
        "last": points[-1][1] if points else None,
        "largest": max((y for _, y in points), default=None),
        "growth": points[-1][1] - points[0][1] if points else None,
        "surely grows": False,
        "growth of the last two thirds, share": 0.0,
    }
    if len(late) > 2:
        line = stats.linregress(*zip(*late, strict=True))
        error = 0.0 if math.isnan(line.stderr) else line.stderr  # NaN where every sample is the same number
        half = float(stats.t.ppf(0.975, len(late) - 2) * error)
        found["slope per minute, last two thirds"] = float(line.slope)
        found["slope, 95 % confidence"] = [float(line.slope) - half, float(line.slope) + half]
        found["surely grows"] = bool(line.slope - half > 0)
        found["growth of the last two thirds, share"] = float(line.slope) * (late[-1][0] - late[0][0]) / late[0][1]
    return found


def show(measured: dict[str, Any]) -> None:
    console = Console()
    table = Table("what", "count", title=f"{measured['minutes']:.1f} minutes")
    for name, value in measured["counts"].items():
        table.add_row(name, str(value))
    console.print(table)
    memory = Table("process", "first MiB", "last", "largest", "slope per minute, last two thirds", "95 % confidence")
    for kind, found in measured["memory"].items():
        if "slope, 95 % confidence" not in found:
            continue
        interval = "{:+.3f} to {:+.3f}".format(*found["slope, 95 % confidence"])
        figures = [f"{found[name]:.0f}" for name in ("first", "last", "largest")]
        memory.add_row(kind, *figures, f"{found['slope per minute, last two thirds']:+.3f}", interval)
    console.print(memory)
    for failure in measured["failures"]:
        console.print(failure, style="red", markup=False)
    console.print("[red]FAILED" if measured["failures"] else "[green]nothing failed, nothing was left behind")


if __name__ == "__main__":
    raise SystemExit(main())
