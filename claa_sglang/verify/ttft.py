"""TTFT of pruned and dense requests, in pairs a moment apart, and the ratio with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from claa_sglang.offline.interval import CONFIDENCE
from claa_sglang.verify.asking import Keys
from claa_sglang.verify.client import DENSE, PRUNED, Client
from claa_sglang.verify.plan import LEAST_PAIRS
from claa_sglang.verify.prompts import Prompts


class Ratio(msgspec.Struct, frozen=True):
    """Median over pairs of pruned TTFT over dense's. low, high: its interval; coverage: with what probability."""

    median: float
    low: float
    high: float
    coverage: float


class Times(msgspec.Struct, frozen=True):
    """Seconds of each pair, and prompt tokens. left_out: why a pair was not counted."""

    pruned: list[float]
    dense: list[float]
    tokens: list[int]
    left_out: list[str]


def measure(client: Client, keys: Keys, prompts: Prompts, tokens: int, pairs: int) -> Times:
    """Time `pairs` pairs after one that warms up. Each has a prompt of its own, cold both ways, and another order.

    Raises VerifyError.
    """
    times = Times([], [], [], [])
    for index in range(pairs + 1):
        prompt = prompts.pair(tokens).first
        seconds, why, length = {}, "", 0
        for kind, claa in (("pruned", PRUNED), ("dense", DENSE))[:: 1 if index % 2 else -1]:
            answer = client.ask(prompt, claa, 1, keys.new(), compared=False, stream=True)
            assert answer.ttft is not None
            seconds[kind], length = answer.ttft, answer.prompt_tokens
            if answer.cached:
                why = f"{answer.cached} tokens were cached"
            elif answer.pruned != (kind == "pruned"):
                why = f"{kind} ran otherwise: {answer.report.get('reason', 'it was pruned')}"
        if why:
            times.left_out.append(why)
        elif index:
            times.pruned.append(seconds["pruned"])
            times.dense.append(seconds["dense"])
            times.tokens.append(length)
    return times


def ratio(times: Times) -> Ratio | None:
    """None of fewer than LEAST_PAIRS pairs."""
    ratios = [pruned / dense for pruned, dense in zip(times.pruned, times.dense, strict=True)]
    return median_interval(ratios) if len(ratios) >= LEAST_PAIRS else None


def median_interval(values: Sequence[float]) -> Ratio:
    """The median of one value or more, and the narrowest interval between two of them that covers it at 95 %.

    Nothing is assumed of how values are distributed, so that one request that waited behind traffic does no harm. Of
    fewer than six values the interval is all of them, and covers less.
    """
    ordered, count = sorted(values), len(values)
    place = max((k for k in range((count + 1) // 2) if _coverage(count, k) >= CONFIDENCE), default=0)
    low, high = ordered[place], ordered[count - 1 - place]
    return Ratio(statistics.median(ordered), low, high, _coverage(count, place))


def _coverage(count: int, place: int) -> float:
    """Probability that the true median lies between the values at `place` from both ends: of fair coins."""
    return 1 - 2 * sum(math.comb(count, i) for i in range(place + 1)) / 2**count
