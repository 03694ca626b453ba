"""What scores on this GPU: of `--claa-scorer auto`, the faster of Triton and FlashInfer, measured once at start.

Tensor-parallel ranks need not choose alike. Each scores its own KV heads, both ways fill the same tensor, and all ranks
keep by the largest of what they have together (`KernelScorer.merge`).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from claa_sglang.config.config import ClaaConfig, ScorerName
from claa_sglang.forward.scorers import FlashInferScorer, KernelRanker, KernelScorer, Scored
from claa_sglang.kernels import paged_lse
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState

logger = logging.getLogger(__name__)

TOKENS = 8192  # of the request that is timed, at most
RUNS, WARM = 9, 3
# FlashInfer is taken where it is faster by so much. Closer than that, the same server would choose now one, now the
# other, and Triton's scores do not depend on the batch.
MARGIN = 0.05
NOT_AT_HAND = "FlashInfer is not imported here, or its kernel for this model is not compiled"
_AHEAD = 1_000_000  # GPU cycles of idling, in which the host launches what is timed


class Choice(NamedTuple):
    """What scores, why, and what was measured: microseconds of one scored layer's attention; empty if nothing was."""

    scorer: ScorerName
    reason: str
    microseconds: Mapping[str, float]


def choose(config: ClaaConfig, key_buffer: Tensor, heads: int, table: Tensor, ranker: KernelRanker) -> Choice:
    """What scores, of the configured value and, for `auto`, of what is measured. Logs it where that is not plain.

    Args:
        config: the server's configuration.
        key_buffer: keys of one layer, `[slots, kv_heads, head_dim]`, on a GPU; read, and their values do not matter.
        heads: query heads of this rank.
        table: the request table; only its device, type and width matter.
        ranker: what is scored.

    Raises RuntimeError where `flashinfer` was asked for and cannot run.
    """
    dtype, head_dim = key_buffer.dtype, key_buffer.shape[-1]
    if config.scorer == "flashinfer":
        if not paged_lse.takes(dtype, head_dim):
            return _logged(Choice("triton", f"FlashInfer has no kernel for {dtype} and head size {head_dim}", {}))
        try:
            _layer(FlashInferScorer, config, key_buffer, heads, table, ranker, config.window + 1)()
        except Exception as error:
            raise RuntimeError(
                f"--claa-scorer flashinfer: cannot run here: {type(error).__name__}: {error}. Remedy: start with "
                "--claa-scorer auto or triton"
            ) from error
        return Choice("flashinfer", "as configured", {})
    if config.scorer != "auto":
        return Choice(config.scorer, "as configured", {})
    tokens = min(TOKENS, key_buffer.shape[0], table.shape[1])
    if not paged_lse.is_ready(dtype, head_dim) or tokens <= config.window:
        return Choice("triton", NOT_AT_HAND, {})
    measured = {"triton": _median(_layer(KernelScorer, config, key_buffer, heads, table, ranker, tokens))}
    try:
        measured["flashinfer"] = _median(_layer(FlashInferScorer, config, key_buffer, heads, table, ranker, tokens))
    except Exception as error:  # noqa: BLE001
        paged_lse.release()
        return _logged(Choice("triton", f"FlashInfer failed: {type(error).__name__}: {error}", {}))
    choice = faster(measured)
    if choice.scorer == "triton":
        paged_lse.release()
    return _logged(choice)


def faster(microseconds: Mapping[str, float]) -> Choice:
    """The choice between measured `triton` and `flashinfer`."""
    wins = microseconds["flashinfer"] < (1 - MARGIN) * microseconds["triton"]
    rounded = {name: round(value, 1) for name, value in microseconds.items()}
    return Choice("flashinfer" if wins else "triton", "measured", rounded)


def _logged(choice: Choice) -> Choice:
    times = ", ".join(f"{name} {value} us" for name, value in choice.microseconds.items())
    logger.info("CLAA scores with %s: %s%s", choice.scorer, choice.reason, f" ({times} for a layer)" if times else "")
    return choice


def _layer(
    kind: type[KernelScorer],
    config: ClaaConfig,
    key_buffer: Tensor,
    heads: int,
    table: Tensor,
    ranker: KernelRanker,
    tokens: int,
) -> Callable[[], None]:
    """One scored layer's attention of one request of `tokens` tokens, every look; planned already."""
    # As wide as the real one: Triton compiles a kernel for each kind of stride. Every token has a slot of its own.
    slots = table.new_zeros(1, table.shape[1])
    slots[0, :tokens] = torch.arange(tokens, dtype=table.dtype, device=table.device)
    state = RequestState.dense_request(RequestOptions(), 0, "warm-up")
    scorer = kind([Scored(0, state, 0, 0, tokens)], slots, config, ranker)
    queries = torch.zeros(config.window, heads, key_buffer.shape[-1], dtype=key_buffer.dtype, device=table.device)

    def run() -> None:
        for look in range(len(ranker.looks)):
            scorer.mass(look, queries, key_buffer, 1.0)

    run()
    return run


def _median(run: Callable[[], None]) -> float:
    """Microseconds on the GPU; before each run it idles, so that it does not wait for launches."""
    times = []
    for _ in range(WARM + RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times[WARM:])
