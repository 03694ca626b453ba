"""Whether load changes an answer: 510 requests, retracted, aborted, short of memory; then each of them alone.

    python -m benchmarks.load [--quick] [--model tiny] [--out benchmarks/results/load.json]

A pruned server with too small a pool, forced retractions and strict accounting in every step (`benchmarks.traffic`)
gets shared prefixes as text and random prompts as token ids from SGLang's own benchmark client, up to 32 at a time; a
seeded 5 % of them hang up or are aborted. Prompts lie on both sides of the pruning threshold. The shared prefixes come
in two bursts with a pause between, in which the server finishes what it can. Then every request that was answered in
full is sent again, alone and with an empty prefix cache, and has to get the same tokens and keep the same positions;
dense, if it followed a finished prefix. Everything is float32, so equal means equal. Two tokens whose log probabilities
differ by less than 1e-4 may swap, as sums of other batches round otherwise, and so may two positions with scores within
1e-4: such a swap is counted apart, with its margin.

The exit status is 1 unless nothing failed, nothing differed, no slot was left behind, and retractions, aborts, pruned
and dense requests, and requests over finished prefixes were all there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.traffic import MODELS, Call, Client, leaks, pressed_server, provenance, retractions
from claa_sglang.tools.servers import Server

RESULT = Path(__file__).resolve().parent / "results" / "load.json"
TIE = 1e-4  # largest difference of two log probabilities that rounding may swap
GROUPS = 8
PAUSE = 20.0  # seconds at most, for the server to finish prefixes in
CHOICES = 100  # log probabilities asked for where an answer differs


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="claa-load-") as temp, pressed_server(args.model, Path(temp)) as running:
        client = Client(running, Path(temp, "client.log"), args.seed)
        measured = measure(running, client, args.requests)
        if measured["failures"]:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.with_suffix(".server.log").write_text(running.log())
    measured["seconds"]["whole run"] = round(time.perf_counter() - began, 1)
    show(measured)
    record = {**provenance("benchmarks.load", argv), "model": args.model, "seed": args.seed, **measured}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(measured["failures"]))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=510, help="in all (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="120 requests")
    parser.add_argument("--model", default=MODELS[0], choices=MODELS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.quick:
        args.requests = 120
    return args


def measure(running: Server, client: Client, requests: int) -> dict[str, Any]:
    """Load, then each request alone. `failures` of the result says in words what is wrong, if anything is."""
    seconds = {}
    began = time.perf_counter()
    calls = send(client, requests)
    seconds["load"] = round(time.perf_counter() - began, 1)
    leaked = leaks(running)
    began = time.perf_counter()
    complete = [call for call in calls if call.complete]
    differences = alone(running, complete) if running.process.poll() is None else []
    seconds["alone"] = round(time.perf_counter() - began, 1)
    leaked = leaked or leaks(running)
    kinds = Counter(kind(call) for call in complete)
    aborted = Counter(call.abort for call in calls if call.abort and not call.complete)
    errors = [f"{call.rid}: {call.wrong.strip()[-500:]}" for call in calls if call.wrong]
    ties = [difference for difference in differences if difference["tie"]]
    counts = {
        "requests": len(calls),
        "answered": len(complete),
        "answered, pruned": kinds["pruned"],
        "answered, dense": kinds["dense"],
        "answered, dense over a finished prefix": kinds["finished"],
        **{f"given up: {how}": count for how, count in sorted(aborted.items())},
        "errors": len(errors),
        "identical alone": len(complete) - len(differences),
        "near-ties": len(ties),
        "different alone": len(differences) - len(ties),
        **{f"retracted: {why}": count for why, count in retractions(running.log()).items()},
    }
    failures = [*errors, *(str(difference) for difference in differences if not difference["tie"])]
    failures += [f"left behind: {leaked}"] if leaked else []
    needed = {"answered, pruned", "answered, dense", "retracted: forced", "identical alone"}
    needed.add("answered, dense over a finished prefix")
    failures += [f"nothing was shown: {name} is 0" for name in sorted(needed) if not counts[name]]
    failures += [] if aborted else ["nothing was shown: no request was given up"]
    return {"counts": counts, "seconds": seconds, "differences": differences, "failures": failures}


def kind(call: Call) -> str:
    """pruned, dense, or finished: dense as its prefix was finished."""
    return "pruned" if call.report.get("pruned") else "finished" if call.report.get("finished_tokens") else "dense"


def send(client: Client, requests: int) -> list[Call]:
    """Shared prefixes in two bursts, the same prompts in both, then random prompts; with SGLang's client."""
    shared = max(1, round(0.275 * requests / GROUPS))
    burst = (
        *("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", str(GROUPS)),
        *("--gsp-prompts-per-group", str(shared), "--gsp-system-prompt-len", "450", "--gsp-question-len", "80"),
        *("--gsp-output-len", "40", "--gsp-range-ratio", "0.4", "--seed", str(client.seed)),
    )
    calls = client.run(*burst)
    pause(client.server)
    calls += client.run(*burst)
    return calls + client.run(
        *("--dataset-name", "random-ids", "--tokenize-prompt", "--num-prompts", str(requests - 2 * GROUPS * shared)),
        *("--random-input-len", "600", "--random-output-len", "48", "--random-range-ratio", "0.1"),
    )


def pause(running: Server) -> None:
    """Until nothing waits to be finished, or some seconds have passed."""
    end = time.monotonic() + PAUSE
    while running.get("/server_info").json()["claa"]["finishing"]["waiting"] and time.monotonic() < end:
        time.sleep(0.5)


# --- each request alone ---


def alone(running: Server, calls: Sequence[Call]) -> list[dict[str, Any]]:
    """What differs from the answers in `calls` when nothing else runs and nothing is cached."""
    found = []
    for call in tqdm(calls, desc="alone", unit="request"):
        answer = ask(running, call)
        kept = answer["meta_info"]["claa"].get("kept")
        if answer["output_ids"] != call.tokens or kept != call.report.get("kept"):
            found.append(difference(running, call, answer["output_ids"], kept))
    return found


def ask(running: Server, call: Call, **more: Any) -> dict[str, Any]:
    running.flush()
    prompt = "text" if isinstance(call.prompt, str) else "input_ids"
    params = call.params
    if kind(call) == "finished":
        params = {**params, "custom_params": {"claa": {"enabled": False}}}
    return running.generate(**{prompt: call.prompt}, sampling_params=params, **more)


def difference(running: Server, call: Call, tokens: list[int], kept: list[int] | None) -> dict[str, Any]:
    """Where an answer first differs, and by how much its token there was the better choice when asked alone."""
    under_load = call.report.get("kept")
    found: dict[str, Any] = {"rid": call.rid, "report": {**call.report, "kept": None}, "tie": False}
    if kept != under_load:
        # Other positions make other late layers: how near the tokens are says nothing.
        margin = ranking_margin(running, call) if kept and under_load else float("inf")
        differ = sorted(set(kept or ()) ^ set(under_load or ()))
        return found | {"kept in one only": differ, "ranking margin": margin, "tie": margin < TIE}
    both = enumerate(zip(tokens, call.tokens, strict=True))
    position, (token, token_under_load) = next((i, pair) for i, pair in both if pair[0] != pair[1])
    answer = ask(running, call, return_logprob=True, top_logprobs_num=CHOICES)
    choices = {token: value for value, token, _ in answer["meta_info"]["output_top_logprobs"][position]}
    margin = choices[token] - choices.get(token_under_load, float("-inf"))
    return found | {"position": position, "tokens": [token, token_under_load], "margin": margin, "tie": margin < TIE}


def ranking_margin(running: Server, call: Call) -> float:
    """As `margin_of`, for what the server has served."""
    from transformers import AutoTokenizer

    model, report = running.get("/model_info").json()["model_path"], call.report
    prompt = AutoTokenizer.from_pretrained(model).encode(call.prompt) if isinstance(call.prompt, str) else call.prompt
    return margin_of(Path(model), prompt, report["score_layers"], report["kept_tokens"])


def margin_of(model: Path, prompt: Sequence[int], score_layers: Sequence[int], kept: int) -> float:
    """How far apart two positions next to each other in rank are whose swap would keep others, by transformers' model.

    In float32, for CLAA as the server runs it by default: the smallest such distance, in z-scores; infinite where no
    position is dropped, or none is kept for its rank.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from claa_sglang.offline.capture import observing
    from claa_sglang.offline.study import WINDOW
    from claa_sglang.ranking.rankers import Claa

    ranker, scores = Claa(), []

    def observe(layer: int, q: Any, k: Any, scaling: float) -> None:
        if layer in score_layers:
            scores.append(ranker.score_layer(q[-WINDOW:], k, scaling=scaling))

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode(), observing(loaded, observe):
        loaded(torch.tensor([list(prompt)]), use_cache=False, logits_to_keep=1)
    halves = [layer.chunk(2) for layer in scores]
    folds = [ranker.fold([half[look] for half in halves]) for look in (0, 1)]
    return _margin(folds, ranker.carry, len(prompt), kept, WINDOW)


def _margin(folds: Sequence[Any], loss: float, tokens: int, kept: int, window: int) -> float:
    """Of scores before anything is carried, fp32 [tokens - window]: by the window, and by the last query alone."""
    import torch

    from claa_sglang.ranking.rankers import join
    from claa_sglang.ranking.selection import by_rank, select

    if kept <= window + 1 or kept >= tokens:
        return float("inf")

    def selected(orders: Sequence[Any]) -> Any:
        by_place = [torch.empty_like(fold) for fold in folds]
        for places, order in zip(by_place, orders, strict=True):
            places[order] = -torch.arange(len(order), dtype=places.dtype)
        return select(join(*by_place, loss), tokens, kept, window)

    orders = [by_rank(fold) for fold in folds]
    chosen = selected(orders)
    gaps = torch.stack([-fold[order].diff() for fold, order in zip(folds, orders, strict=True)])
    for at in gaps.flatten().argsort().tolist():
        look, place = divmod(at, gaps.shape[1])
        swapped = [order.clone() for order in orders]
        swapped[look][[place, place + 1]] = orders[look][[place + 1, place]]
        if not torch.equal(selected(swapped), chosen):
            return gaps[look, place].item()
    return float("inf")


def show(measured: dict[str, Any]) -> None:
    console = Console()
    table = Table("what", "count", title="under load, and alone")
    for name, count in measured["counts"].items():
        table.add_row(name, str(count))
    for name, value in measured["seconds"].items():
        table.add_row(f"seconds: {name}", f"{value:.0f}")
    console.print(table)
    for one in measured["differences"]:
        console.print(one)
    for failure in measured["failures"]:
        console.print(failure, style="red", markup=False)
    console.print("[red]FAILED" if measured["failures"] else "[green]every answer is the one it gives alone")


if __name__ == "__main__":
    raise SystemExit(main())
