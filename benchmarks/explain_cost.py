"""What an explanation costs: a request with and without one, the report, and the command as a whole.

    python -m benchmarks.explain_cost --prompt-file prompt.txt --out out/explain.json

Asks a server that was started with `--enable-claa --claa-allow-explain`. Requests are cold, and of the kinds in turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.explain.asking import ALWAYS
from claa_sglang.requests.explanation import explanation
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState
from claa_sglang.requests.step_scores import StepScores
from claa_sglang.tools.connection import Connection

LOOKING = 64  # tokens of `explain_window`
PLAIN: Mapping[str, Any] = {**ALWAYS, "explain": False}
KINDS = {"plain": PLAIN, "explained": ALWAYS, "explained, with a window": {**ALWAYS, "explain_window": LOOKING}}
# What Linux knows of the command alone: `getrusage` counts what its parent had as it was forked.
RUN = """
import sys
from claa_sglang import cli
status = cli.main(sys.argv[1:])
print("".join(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""
LONG, LAYERS = 32_768, 4  # of a report that is made without a server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="default: %(default)s")
    parser.add_argument("--prompt-file", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7, help="requests of each kind (default: %(default)s)")
    parser.add_argument("--machine", default="not told", help="in words")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    server = Connection(args.url)
    info = server.server_info()
    ids = server.post("/tokenize", {"prompt": args.prompt_file.read_text(encoding="utf-8")})["tokens"]
    found = {
        "command": ["python -m benchmarks.explain_cost", *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%d"),
        "machine": args.machine,
        "model": info["model_path"],
        "versions": {"sglang": info["version"], "torch": torch.__version__},
        "config": info["claa"]["config"],
        "prompt_tokens": len(ids),
        "requests": requests(server, ids, args.rounds),
        "long_report": long_report(),
        "explain": command(args.url, args.prompt_file),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("requests", "long_report", "explain")}, indent=1))


def requests(server: Connection, ids: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of cold requests for one token, the first of each kind left out, and bytes of their reports."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    size = {}
    for _ in range(rounds + 1):
        for kind, claa in KINDS.items():
            sampling = {"temperature": 0, "max_new_tokens": 1, "custom_params": {"claa": dict(claa)}}
            body = {"input_ids": ids, "sampling_params": sampling, "extra_key": secrets.token_hex(8)}
            began = time.perf_counter()
            answer = server.post("/generate", body)
            seconds[kind].append(time.perf_counter() - began)
            size[kind] = len(json.dumps(answer["meta_info"]["claa"], separators=(",", ":")))
    return {
        kind: {
            "fastest": round(min(all_[1:]), 3),
            "median": round(statistics.median(all_[1:]), 3),
            "seconds": [round(one, 3) for one in all_[1:]],
            "report_bytes": size[kind],
        }
        for kind, all_ in seconds.items()
    }


def long_report() -> dict[str, Any]:
    """Seconds in which a scheduler makes the explanation of a long prompt, and its bytes; scores are random."""
    step = PruneStep(prune_layer=LAYERS, keep_rate=0.2, score_layers=tuple(range(1, LAYERS + 1)))
    config = ClaaConfig(steps=(step,), num_layers=2 * LAYERS, allow_explain=True)
    options = RequestOptions(explain=True, explain_window=LOOKING)
    state = RequestState.pruned_request(options, config, LONG)
    torch.manual_seed(0)
    layers = [torch.rand(LONG - config.window) * 10 for _ in range(LAYERS)]
    looked_at = [torch.rand(LONG - LOOKING) ** 8 / LONG for _ in range(LAYERS)]
    state.progress.explained[0] = StepScores(torch.stack(layers).amax(0), layers, looked_at)
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        made = explanation(state)
        spent.append(time.perf_counter() - began)
    parts = {"steps": made["steps"], "looked_at": made["looked_at"]}
    sizes = {name: len(json.dumps(part, separators=(",", ":"))) for name, part in parts.items()}
    return {"tokens": LONG, "layers": LAYERS, "seconds": round(statistics.median(spent), 4), "bytes": sizes}


def command(url: str, prompt: Path) -> dict[str, Any]:
    """Time and memory of `claa-sglang explain`, and bytes of its page."""
    with tempfile.TemporaryDirectory() as temp:
        page = Path(temp, "page.html")
        words = ["explain", "--url", url, "--prompt-file", str(prompt), "--chat", "--out", str(page)]
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", RUN, *words], check=True, stdout=subprocess.PIPE, text=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "seconds": round(time.perf_counter() - began, 2),
            "own_cpu_seconds": round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 2),
            "peak_memory_mb": round(int(done.stdout.rsplit("VmHWM:", 1)[1].split()[0]) / 1024, 1),
            "page_bytes": page.stat().st_size,
        }


if __name__ == "__main__":
    main()
