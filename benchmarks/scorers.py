"""Time of a scored layer with Triton's log-sum-exp and with FlashInfer's, beside the time to read its keys.

    python -m benchmarks.scorers [--tokens 8192 32768 131072] [--batch 1 8] [--out benchmarks/results/scorers.json]

Needs one GPU and FlashInfer, whose kernels are compiled by the first run on a machine (minutes). The heads are those of
Llama-3.1-8B: 32 query heads, 8 KV heads, head size 128, bf16, a window of 32. Each case has layers with keys of their
own that take turns, so that no run finds its keys in the L2 cache. Times are medians by CUDA events, in microseconds:

- *triton*, *flashinfer*: the weights of one look, from queries and keys to the largest weight of each token.
- *plan*: what FlashInfer's plan costs the host, once a forward and look, whatever the number of scored layers.
- *K once*: the keys' bytes at the measured speed of a device copy. Both scorers read them twice.

Then the two are compared: the largest difference of a weight, and the share of the kept tokens, at the keep rate, that
both keep. Last, what picks the kept tokens: the stable sort that the server has, and FlashInfer's deterministic top-k.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from claa_sglang.forward.scorer_choice import faster
from claa_sglang.kernels import fold, paged_lse
from claa_sglang.kernels.layout import describe
from claa_sglang.kernels.window_attention import window_mass
from claa_sglang.ranking import selection

ROOT = Path(__file__).resolve().parent.parent
HEADS, KV_HEADS, HEAD_DIM, WINDOW, POOL = 32, 8, 128, 32, 7
DTYPE = torch.bfloat16
SCALING = HEAD_DIM**-0.5
L2_BYTES = 256 << 20  # keys of the layers that take turns are more than this, together
MOST_LAYERS = 16
SPARE = 4 << 30  # bytes of the card that no case takes
AHEAD = 2_000_000  # GPU cycles of idling, in which the host launches what is timed


def main() -> int:
    args = parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.scorers needs a GPU")
    torch.manual_seed(0)
    peak = copy_speed(args.runs)
    cases = []
    for tokens in args.tokens:
        for batch in args.batch:
            free = torch.cuda.mem_get_info()[0] - SPARE
            if not fits(tokens, batch, free):
                print(
                    f"{batch} x {tokens} tokens: {key_bytes(tokens, batch) / 1e9:.1f} GB a layer do not fit", flush=True
                )
                continue
            cases.append(measure(tokens, batch, peak, args))
            print(line(cases[-1]), flush=True)
            torch.cuda.empty_cache()
    write(args, peak, cases, [])  # compiling FlashInfer's top-k takes minutes, on the first run of a machine
    picks = [pick(tokens, args) for tokens in args.tokens]
    for found in picks:
        print(pick_line(found), flush=True)
    write(args, peak, cases, picks)
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scorers", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072], help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests (default: %(default)s)")
    parser.add_argument("--keep-rate", type=float, default=0.2, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each case (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scorers.json")
    return parser.parse_args(argv)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def key_bytes(tokens: int, batch: int) -> int:
    """Of one layer's keys."""
    return tokens * batch * KV_HEADS * HEAD_DIM * DTYPE.itemsize


def layers_in_turn(tokens: int, batch: int) -> int:
    """How many layers take turns: so many that each one's keys have left the L2 cache, two at least."""
    return min(MOST_LAYERS, max(2, -(-L2_BYTES // key_bytes(tokens, batch))))


def fits(tokens: int, batch: int, free: int) -> bool:
    """Whether a case fits into so many bytes: its layers, and one more while random keys are made."""
    return (layers_in_turn(tokens, batch) + 1) * key_bytes(tokens, batch) <= free


def overlap(left: Tensor, right: Tensor, window: int = WINDOW) -> float:
    """Share of the kept tokens that both keep, the window aside, which every selection has. Two int64 `[kept]`."""
    ours, theirs = set(left.tolist()[:-window]), set(right.tolist()[:-window])
    return len(ours & theirs) / max(1, len(ours))


def kept_of(tokens: int, rate: float) -> int:
    return min(tokens, max(WINDOW + 1, round(rate * tokens)))


# --- measuring -------------------------------------------------------------------------------------------------------


def microseconds(runs: Sequence[Callable[[], object]], repeats: int) -> dict[str, float]:
    """Of calls that take turns, on the GPU: median, least and most of `repeats` after a warm round. Before each call
    the GPU idles, so that it does not wait for launches."""
    for run in runs:
        run()
    times = []
    for index in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        begin.record()
        runs[index % len(runs)]()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return summary(times)


def summary(times: Sequence[float]) -> dict[str, float]:
    numbers = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    return {name: round(value, 2) for name, value in numbers.items()}


def copy_speed(repeats: int) -> float:
    """Bytes per microsecond of a device copy of 1 GiB, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)], repeats)["median"]


def measure(tokens: int, batch: int, peak: float, args: argparse.Namespace) -> dict[str, Any]:
    """One case: `batch` requests of `tokens` tokens each, in scattered slots."""
    count = tokens * batch
    table = (torch.randperm(count, device="cuda").to(torch.int32)).view(batch, tokens)
    first_rows, table_rows = [WINDOW * i for i in range(batch)], list(range(batch))
    lengths = [tokens] * batch
    requests = torch.tensor(describe(first_rows, table_rows, lengths, WINDOW), dtype=torch.int32, device="cuda")
    positions = batch * (tokens - WINDOW)
    layers = [
        (
            1.5 * torch.randn(batch * WINDOW, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda"),
            torch.randn(count, KV_HEADS, HEAD_DIM, dtype=DTYPE, device="cuda"),
        )
        for _ in range(layers_in_turn(tokens, batch))
    ]

    def planned() -> paged_lse.PagedLse:
        return paged_lse.PagedLse(
            table, first_rows, table_rows, lengths, window=WINDOW, queries=WINDOW, heads=HEADS, kv_heads=KV_HEADS,
            head_dim=HEAD_DIM, dtype=DTYPE,
        )  # fmt: skip

    def mass(layer: int, plan: paged_lse.PagedLse | None) -> Tensor:
        queries, keys = layers[layer]
        lse = None if plan is None else plan(queries, keys, SCALING)
        return window_mass(
            queries, keys, table, requests, window=WINDOW, scaling=SCALING, max_tokens=tokens, positions=positions,
            peaks=True, lse=lse,
        )  # fmt: skip

    plan = planned()
    found: dict[str, Any] = {"tokens": tokens, "batch": batch, "layers in turn": len(layers)}
    for name, how in (("triton", None), ("flashinfer", plan)):
        found[name] = microseconds([lambda i=i, how=how: mass(i, how) for i in range(len(layers))], args.runs)
    found["flashinfer, log-sum-exp alone"] = microseconds(
        [lambda i=i: plan(*layers[i], SCALING) for i in range(len(layers))], args.runs
    )
    found["plan, host"] = host_microseconds(planned, args.runs)
    once = key_bytes(tokens, batch) / peak
    found |= {"K once": round(once, 2), "K twice": round(2 * once, 2)}
    medians = {name: found[name]["median"] for name in ("triton", "flashinfer")}
    found["auto would take"] = faster(medians).scorer
    ours, theirs = mass(0, None), mass(0, plan)
    found["largest difference"] = float((ours - theirs).abs().max())
    found["largest relative difference"] = float(((ours - theirs).abs() / ours.clamp_min(1e-30)).max())
    found["largest weight"] = float(ours.max())
    kept = [kept_sets(one, requests, tokens, batch, args.keep_rate) for one in (ours, theirs)]
    found["kept by both"] = min(overlap(*pair) for pair in zip(*kept, strict=True))
    return found


def host_microseconds(make: Callable[[], object], repeats: int) -> dict[str, float]:
    """Time that the host spends in a call that does not wait for the GPU."""
    times = []
    for index in range(repeats + 3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        make()
        if index >= 3:
            times.append(1e6 * (time.perf_counter() - begun))
    return summary(times)


def kept_sets(mass: Tensor, requests: Tensor, tokens: int, batch: int, rate: float) -> list[Tensor]:
    """What each request keeps by one layer's weights."""
    ranked = tokens - WINDOW
    ranking = torch.empty(batch * ranked, device=mass.device)
    fold.fold(mass, requests, ranking, window=WINDOW, pool_kernel=POOL, max_tokens=tokens, first_layer=True)
    kept = kept_of(tokens, rate)
    return [selection.select(one, tokens, kept, WINDOW) for one in ranking.split(ranked)]


def pick(tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """The kept tokens of one request by the server's stable sort and by FlashInfer's top-k."""
    rankings = [torch.randn(tokens - WINDOW, device="cuda") for _ in range(8)]
    kept = kept_of(tokens, args.keep_rate)
    found: dict[str, Any] = {"tokens": tokens, "kept": kept}
    ways = {"stable sort": selection.select, "top_k": select_by_top_k}
    for name, select in ways.items():
        try:
            runs = [lambda one=one, select=select: select(one, tokens, kept, WINDOW) for one in rankings]
            found[name] = microseconds(runs, args.runs)
        except Exception as error:  # noqa: BLE001
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            return found
    # Ties at the edge too: a few values, each many times.
    coarse = [*rankings, *((4 * one).round() for one in rankings)]
    same = [torch.equal(*(select(one, tokens, kept, WINDOW) for select in ways.values())) for one in coarse]
    found["same tokens, distinct values"], found["same tokens, ties"] = all(same[:8]), all(same[8:])
    return found


def select_by_top_k(ranking: Tensor, prompt_tokens: int, kept: int, window: int) -> Tensor:
    """`selection.select` for fewer than all tokens, with FlashInfer's top-k in place of the sort."""
    from flashinfer import TopKTieBreak, top_k

    values = ranking[1:].masked_fill(ranking[1:].isnan(), -torch.inf)
    count = max(0, kept - window - 1)
    _, others = top_k(values.view(1, -1), count, deterministic=True, tie_break=TopKTieBreak.SMALL)
    device = ranking.device
    best = torch.cat((torch.arange(min(1, kept - window), device=device), others[0] + 1))
    return torch.cat((best.sort().values, torch.arange(prompt_tokens - window, prompt_tokens, device=device)))


# --- reporting -------------------------------------------------------------------------------------------------------


def line(found: dict[str, Any]) -> str:
    triton, flashinfer, plan = (found[name]["median"] for name in ("triton", "flashinfer", "plan, host"))
    return (
        f"{found['batch']} x {found['tokens']}: triton {triton:.0f} us, flashinfer {flashinfer:.0f} us (plan "
        f"{plan:.0f} us on the host), K once {found['K once']:.0f} us; difference {found['largest difference']:.1e}, "
        f"kept by both {found['kept by both']:.4f}"
    )


def pick_line(found: dict[str, Any]) -> str:
    if "error" in found["top_k"]:
        return f"{found['tokens']}: top_k {found['top_k']['error']}"
    sort, top_k = found["stable sort"]["median"], found["top_k"]["median"]
    same, ties = found["same tokens, distinct values"], found["same tokens, ties"]
    return f"{found['tokens']}: stable sort {sort:.0f} us, top_k {top_k:.0f} us; the same tokens: {same}, ties {ties}"


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("claa-sglang", "sglang", "torch", "triton", "flashinfer-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a machine that has the sources alone
            found[name] = None
    return found


def write(args: argparse.Namespace, peak: float, cases: list[dict[str, Any]], picks: list[dict[str, Any]]) -> None:
    record = {
        "command": "python -m benchmarks.scorers " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "window": WINDOW, "dtype": str(DTYPE)},
        "runs": args.runs,
        "keep rate": args.keep_rate,
        "device copy, bytes per microsecond": round(peak),
        "times, microseconds": cases,
        "picking the kept tokens, microseconds": picks,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
