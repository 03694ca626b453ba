"""Time of early layers' attention where each block of queries reads a few earlier keys that matter, against all.

    python -m benchmarks.block_attention [--tokens 32768 131072] [--budgets 2048 4096] [--samples 64 16] [--out FILE]

Needs one GPU with fa3. One layer of Llama-3.1-8B's heads (32 of queries, 8 of KV, head size 128, bf16) serves a prompt
in chunks, as a server does, with random numbers in scattered slots; its times are summed over the chunks of the prompt.

- *dense*: fa3 over the paged cache, as SGLang calls it.
- *blocks*: each block of queries reads `budget` earlier tokens of its own for each KV head, and itself. The cache
  `[slots, kv_heads, d]` is read as `[slots * kv_heads, 1, d]`, so that a block is one sequence for each KV head, whose
  row lists what it reads. Putting queries and results in that order is in the time.
- *selection*: the weights that a sample of the block's queries gives every earlier token (`window_mass`, the largest of
  the sample), pooled; the best of them beside the first and the last tokens; and the rows. *weights* and *rows* are
  parts of it.

Which tokens are selected does not matter to a time. With a budget of all earlier tokens the result must be dense's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from claa_sglang.kernels.layout import describe
from claa_sglang.kernels.window_attention import window_mass

ROOT = Path(__file__).resolve().parent.parent
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
GROUP, SCALING, DTYPE = HEADS // KV_HEADS, HEAD_DIM**-0.5, torch.bfloat16
BLOCK, POOL = 2048, 7
SINKS, LOCAL = 16, 512  # first and last earlier tokens, which every block reads
TOLERANCE = 2e-2  # of bf16 results around 1, summed in another order


class Layer:
    """One layer's cache, the slots of one prompt of `tokens`, and queries of a chunk."""

    def __init__(self, tokens: int, chunk: int, device: str = "cuda") -> None:
        self.chunk = chunk
        self.table = torch.randperm(tokens, device=device).to(torch.int32)[None]
        shape = (tokens, KV_HEADS, HEAD_DIM)
        self.keys, self.values = (torch.randn(shape, dtype=DTYPE, device=device) for _ in range(2))
        self.queries = 1.5 * torch.randn(chunk, HEADS, HEAD_DIM, dtype=DTYPE, device=device)


def dense(layer: Layer, end: int) -> Tensor:
    """Attention of the chunk that ends at `end`: bf16 `[chunk, heads, d]`."""
    return paged(layer.queries, layer.keys, layer.values, layer.table[:, :end], [end], layer.chunk)


def selected(layer: Layer, end: int, budget: int, samples: int) -> list[Tensor]:
    """What each block of the chunk that ends at `end` reads beside itself: int64 `[kv_heads, n]` positions, each."""
    starts = range(end - layer.chunk, end, BLOCK)
    ranked = [(index, start) for index, start in enumerate(starts) if start > budget]
    everything = [torch.arange(start, device=layer.table.device).expand(KV_HEADS, -1) for start in starts]
    if not ranked:
        return everything
    starts_of_blocks = [start for _, start in ranked]
    for index, own in zip([i for i, _ in ranked], weights(layer, end, starts_of_blocks, samples), strict=True):
        everything[index] = best(own, budget)
    return everything


def weights(layer: Layer, end: int, starts: Sequence[int], samples: int) -> list[Tensor]:
    """The largest weight that a sample of each block's queries give an earlier token: fp32 `[kv_heads, start]`, each.

    starts: of the blocks, the last ones of the chunk that ends at `end`.
    """
    first_rows, lengths = [samples * i for i in range(len(starts))], [start + samples for start in starts]
    step, first = BLOCK // samples, end - layer.chunk
    blocks_of = [layer.queries[start - first : start - first + BLOCK] for start in starts]
    sample = torch.cat([block[step - 1 :: step] for block in blocks_of])
    requests = torch.tensor(describe(first_rows, [0] * len(starts), lengths, samples), dtype=torch.int32)
    mass = window_mass(
        sample, layer.keys, layer.table, requests.to(sample.device, non_blocking=True), window=samples,
        scaling=SCALING, max_tokens=max(lengths), positions=sum(starts), peaks=True,
    )  # fmt: skip
    parts = mass.split([KV_HEADS * start for start in starts])
    return [part.view(KV_HEADS, start) for part, start in zip(parts, starts, strict=True)]


def best(weights: Tensor, budget: int) -> Tensor:
    """int64 `[kv_heads, budget]` positions of the largest weights, pooled, beside the first and the last ones."""
    pooled = avg_pool1d(weights, POOL, 1, POOL // 2)
    pooled[:, :SINKS] = torch.inf
    pooled[:, weights.shape[1] - LOCAL :] = torch.inf
    return pooled.topk(budget, sorted=False).indices


def rows_of(layer: Layer, end: int, selection: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """The rows of the cache, read as one head a row: int32 `[blocks * kv_heads, longest]`, and their lengths."""
    heads = torch.arange(KV_HEADS, device=layer.table.device, dtype=torch.int32)[:, None]
    lengths = [chosen.shape[1] + BLOCK for chosen in selection]
    rows = torch.zeros(len(lengths), KV_HEADS, max(lengths), dtype=torch.int32, device=layer.table.device)
    for index, chosen in enumerate(selection):
        start, count = end - layer.chunk + BLOCK * index, chosen.shape[1]
        rows[index, :, :count] = layer.table[0, chosen] * KV_HEADS + heads
        rows[index, :, count : count + BLOCK] = layer.table[:, start : start + BLOCK] * KV_HEADS + heads
    return rows.view(-1, rows.shape[2]), [length for length in lengths for _ in range(KV_HEADS)]


def select(layer: Layer, end: int, budget: int, samples: int) -> tuple[Tensor, list[int]]:
    """`rows_of` what is selected."""
    return rows_of(layer, end, selected(layer, end, budget, samples))


def blocks(layer: Layer, rows: Tensor, lengths: list[int]) -> Tensor:
    """Attention of a chunk over `rows_of`: bf16 `[chunk, heads, d]`."""
    split = (layer.chunk // BLOCK, BLOCK, KV_HEADS, GROUP, HEAD_DIM)
    queries = layer.queries.view(split).transpose(1, 2).reshape(-1, GROUP, HEAD_DIM)
    keys, values = (cache.view(-1, 1, HEAD_DIM) for cache in (layer.keys, layer.values))
    found = paged(queries, keys, values, rows, lengths, BLOCK)
    return found.view(split[0], KV_HEADS, BLOCK, GROUP, HEAD_DIM).transpose(1, 2).reshape(layer.chunk, HEADS, HEAD_DIM)


def paged(queries: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: list[int], rows: int) -> Tensor:
    """fa3 with pages of one token, for sequences of `rows` queries each."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    def on_device(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, pin_memory=True).to(queries.device, non_blocking=True)

    total = [0]
    for length in lengths:
        total.append(total[-1] + length)
    return flash_attn_with_kvcache(
        q=queries, k_cache=keys[:, None], v_cache=values[:, None], page_table=table, cache_seqlens=on_device(lengths),
        cu_seqlens_q=on_device(range(0, queries.shape[0] + 1, rows)), cu_seqlens_k_new=on_device(total),
        max_seqlen_q=rows, softmax_scale=SCALING, causal=True,
    )  # fmt: skip


# --- measuring ---


def milliseconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Of each of `repeats` calls on the GPU, after one to warm up. It idles before each, which hides launches."""
    times = []
    for index in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if index:
            times.append(begin.elapsed_time(end))
    return times


def measure(tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Times of one layer for a whole prompt, in milliseconds: medians over runs, summed over chunks."""
    layer, ends = Layer(tokens, args.chunk), range(args.chunk, tokens + 1, args.chunk)

    def timed(call: Callable[..., object], given: Callable[[int], tuple[Any, ...]]) -> dict[str, float]:
        return over(milliseconds(partial(call, layer, end, *given(end)), args.runs) for end in ends)

    found: dict[str, Any] = {"tokens": tokens, "dense": timed(dense, lambda _: ())}
    for samples in args.samples:
        for budget in args.budgets:
            parts = {"selection": timed(select, lambda _, b=budget, s=samples: (b, s))}
            later = {end: [start for start in range(end - args.chunk, end, BLOCK) if start > budget] for end in ends}
            ranked = [end for end in ends if later[end]]
            parts["of that, weights"] = over(
                milliseconds(partial(weights, layer, end, later[end], samples), args.runs) for end in ranked
            )
            chosen = {end: selected(layer, end, budget, samples) for end in ends}
            parts["of that, rows"] = timed(rows_of, lambda end, chosen=chosen: (chosen[end],))
            parts["blocks"] = over(
                milliseconds(partial(blocks, layer, *rows_of(layer, end, chosen[end])), args.runs) for end in ends
            )
            share = (parts["selection"]["median"] + parts["blocks"]["median"]) / found["dense"]["median"]
            name = f"{budget}, {samples} samples"
            found[name] = {**parts, "of dense": round(share, 4)}
            print(f"{tokens} tokens, {name}: {found[name]} of {found['dense']}", flush=True)
    return found


def over(chunks: Iterable[list[float]]) -> dict[str, float]:
    """Sums over the chunks: of medians, of least and of most times."""
    each = list(chunks)
    how = {"median": statistics.median, "min": min, "max": max}
    return {name: round(sum(of(values) for values in each), 3) for name, of in how.items()}


def check(chunk: int) -> float:
    """Largest difference from dense where the budget holds every earlier token; and that it is small."""
    layer, end = Layer(2 * chunk, chunk), 2 * chunk
    difference = float((blocks(layer, *select(layer, end, end, 64)).float() - dense(layer, end).float()).abs().max())
    if not difference < TOLERANCE:
        raise SystemExit(f"blocks that read everything differ from dense by {difference}")
    return difference


def main() -> int:
    args = parse_args()
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "command": "python -m benchmarks.block_attention " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("claa-sglang", "sglang", "torch", "triton")},
        "heads": [HEADS, KV_HEADS, HEAD_DIM],
        "block": BLOCK,
        "chunk": args.chunk,
        "runs": args.runs,
        "largest difference from dense, budget of everything": check(args.chunk),
        "milliseconds of one layer": [],
    }
    for tokens in args.tokens:
        record["milliseconds of one layer"].append(measure(tokens, args))
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        torch.cuda.empty_cache()
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536, 131072], help="default: %(default)s")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 4096, 8192], help="default: %(default)s")
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[64], help="queries of a block (default: %(default)s)"
    )
    parser.add_argument("--chunk", type=int, default=8192, help="tokens, whole blocks (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each call (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "block_attention.json")
    args = parser.parse_args(argv)
    if args.chunk % BLOCK or any(tokens % args.chunk for tokens in args.tokens):
        parser.error(f"--chunk must be whole blocks of {BLOCK}, and --tokens whole chunks")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
