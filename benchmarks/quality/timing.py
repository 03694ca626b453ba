"""TTFT of pruned, dense and stock requests of the same prompt, one request at a time and nothing cached.

Dense is a server with CLAA that is told not to prune. Stock is another server, without CLAA, on the same card.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import msgspec
from tqdm import tqdm

from benchmarks.quality.asking import Job, check_report
from benchmarks.quality.endpoints import Endpoint, request_body
from benchmarks.quality.settings import DENSE, STOCK, Setting


class Spread(msgspec.Struct, frozen=True):
    """Of the rounds' values: median, least and most."""

    median: float
    least: float
    most: float


class Ttft(msgspec.Struct, frozen=True):
    """Times of one setting at one length.

    seconds: of whole requests with one output token, one per round. median: of them. ratio: median over rounds of this
    setting's time over dense's in the same round, for the same prompt. to_stock: the same over stock's; None without
    a stock server.
    """

    length: int
    ranker: str
    keep_rate: float
    seconds: list[float]
    median: float
    ratio: float
    to_stock: Spread | None = None


def measure(
    endpoint: Endpoint,
    jobs: dict[int, list[Job]],
    settings: Sequence[Setting],
    rounds: int,
    stock: Endpoint | None = None,
) -> list[Ttft]:
    """`rounds` times of each setting and length, after one round that warms up.

    jobs: prompts by length; each round takes the next, from the beginning again when there are no more. Settings, and
    stock with them, take turns within a round, in the opposite order in the next. stock: a server without CLAA.
    """
    found = []
    timed = [*settings, *([STOCK] if stock else [])]
    for length, prompts in sorted(jobs.items()):
        seconds: dict[Setting, list[float]] = {setting: [] for setting in timed}
        for index in tqdm(range(rounds + 1), desc=f"TTFT at {length}", unit="round"):
            job = prompts[index % len(prompts)]
            for setting in timed if index % 2 else timed[::-1]:
                taken = _stock_ttft(stock, job) if stock and setting == STOCK else _ttft(endpoint, job, setting)
                if index:
                    seconds[setting].append(taken)
        for setting, times in seconds.items():
            ratio = statistics.median(_ratios(times, seconds[DENSE]))
            to_stock = None
            if stock:
                ratios = _ratios(times, seconds[STOCK])
                to_stock = Spread(statistics.median(ratios), min(ratios), max(ratios))
            middle = statistics.median(times)
            found.append(Ttft(length, setting.ranker, setting.keep_rate, times, middle, ratio, to_stock))
    return found


def _ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    return [mine / other for mine, other in zip(times, others, strict=True)]


def _ttft(endpoint: Endpoint, job: Job, setting: Setting) -> float:
    seconds, answer = _timed(endpoint, request_body(job.input_ids, job.options(setting), max_new_tokens=1))
    report = check_report(answer["meta_info"], setting)
    _nothing_cached(setting, report["early_cached_tokens"])
    return seconds


def _stock_ttft(endpoint: Endpoint, job: Job) -> float:
    seconds, answer = _timed(endpoint, request_body(job.input_ids, None, max_new_tokens=1))
    _nothing_cached(STOCK, answer["meta_info"]["cached_tokens"])
    return seconds


def _timed(endpoint: Endpoint, body: dict) -> tuple[float, dict]:
    endpoint.flush()
    start = time.perf_counter()
    answer = endpoint.run(endpoint.ask(body))
    return time.perf_counter() - start, answer


def _nothing_cached(setting: Setting, cached: int) -> None:
    if cached:
        raise RuntimeError(f"{setting.name}: {cached} tokens were cached: something else runs")
