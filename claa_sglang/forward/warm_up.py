"""Compile the GPU kernels for this model before the first request: on it, a second or two would count as its TTFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from claa_sglang.config.config import ClaaConfig
from claa_sglang.forward.scorer_choice import Choice, choose
from claa_sglang.forward.scorers import KernelScorer, Scored, in_kernels
from claa_sglang.memory.boundary import BoundaryStore
from claa_sglang.ranking.spec import RankerSpec, parse
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState

FP8_CAPABILITY = (8, 9)  # the first with e4m3


class UnsupportedKeys(RuntimeError):
    """This GPU cannot score keys of this type."""


def warm_up(
    key_buffer: Tensor,
    heads: int,
    dtype: torch.dtype,
    table: Tensor,
    boundaries: Sequence[BoundaryStore],
    config: ClaaConfig,
) -> Choice:
    """Run every kernel once on next to nothing, and choose what scores; where there is no GPU, that is torch.

    Args:
        key_buffer: keys of one layer, `[slots, kv_heads, head_dim]`.
        heads: query heads of this rank. dtype: of queries.
        table: the widened request table; its row 0 belongs to no request, and slot 0, which it lists, to nobody.
        boundaries: the boundary stores.

    Raises UnsupportedKeys; what Triton raises, if a kernel does not compile or run; RuntimeError if what is to score
    cannot.
    """
    if not table.is_cuda:
        return Choice("torch", "there is no GPU", {})
    if key_buffer.element_size() == 1 and torch.cuda.get_device_capability(table.device) < FP8_CAPABILITY:
        raise UnsupportedKeys(
            f"{torch.cuda.get_device_name(table.device)} has no fp8 e4m3 in its instructions, with which keys are "
            "scored; use --kv-cache-dtype auto, or serve without --enable-claa"
        )
    state = RequestState.dense_request(RequestOptions(), 0, "warm-up")
    # Another ranker that a request may ask for is compiled on its first one.
    ranker = in_kernels(parse(config.ranker), config) or in_kernels(RankerSpec(), config)
    assert ranker is not None
    scorer = KernelScorer([Scored(0, state, 0, 0, config.window + 1)], table, config, ranker)
    # Of one request with one position before its window.
    queries = torch.zeros(config.window, heads, key_buffer.shape[-1], dtype=dtype, device=table.device)
    mass = torch.zeros(key_buffer.shape[1], device=table.device)
    slot = torch.zeros(1, dtype=torch.int64, device=table.device)

    def fold() -> None:
        for first_layer in (True, False):
            scorer.fold(0, mass, first_layer)

    looks = [partial(scorer.mass, look, queries, key_buffer, 1.0) for look in range(len(ranker.looks))]

    def move(boundary: BoundaryStore) -> None:
        boundary.store(slot, *boundary.load(slot))

    in_triton: list[Callable[[], object]] = [] if config.scorer == "torch" else [*looks, fold]
    _side_by_side([*in_triton, *(partial(move, boundary) for boundary in boundaries)])
    choice = choose(config, key_buffer, heads, table, ranker)
    # Forwards run in another stream, and FlashInfer's workspace is one for all of them.
    torch.cuda.synchronize(table.device)
    return choice


def _side_by_side(works: Sequence[Callable[[], object]]) -> None:
    """Each in a thread: most of a compilation is spent in LLVM, ptxas and a C compiler, outside Python."""
    stream = torch.cuda.current_stream()

    def run(work: Callable[[], object]) -> None:
        with torch.cuda.stream(stream):  # of a new thread, device and stream are the first ones
            work()

    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(run, work) for work in works]:
            done.result()
