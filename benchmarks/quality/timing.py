"""TTFT of pruned requests against dense ones of the same prompt, one request at a time and nothing cached."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import msgspec
from tqdm import tqdm

from benchmarks.quality.asking import Job, check_report
from benchmarks.quality.endpoints import Endpoint, request_body
from benchmarks.quality.settings import DENSE, Setting


class Ttft(msgspec.Struct, frozen=True):
    """Times of one setting at one length.

    seconds: of whole requests with one output token, one per round. median: of them. ratio: median over rounds of this
    setting's time over dense's in the same round, for the same prompt.
    """

    length: int
    ranker: str
    keep_rate: float
    seconds: list[float]
    median: float
    ratio: float


def measure(endpoint: Endpoint, jobs: dict[int, list[Job]], settings: Sequence[Setting], rounds: int) -> list[Ttft]:
    """`rounds` times of each setting and length, after one round that warms up.

    jobs: prompts by length; each round takes the next, from the beginning again when there are no more. Settings take
    turns within a round, in the opposite order in the next.
    """
    found = []
    for length, prompts in sorted(jobs.items()):
        seconds: dict[Setting, list[float]] = {setting: [] for setting in settings}
        for index in tqdm(range(rounds + 1), desc=f"TTFT at {length}", unit="round"):
            job = prompts[index % len(prompts)]
            for setting in settings if index % 2 else settings[::-1]:
                taken = _ttft(endpoint, job, setting)
                if index:
                    seconds[setting].append(taken)
        for setting, times in seconds.items():
            ratios = [mine / dense for mine, dense in zip(times, seconds[DENSE], strict=True)]
            middle = statistics.median(times), statistics.median(ratios)
            found.append(Ttft(length, setting.ranker, setting.keep_rate, times, *middle))
    return found


def _ttft(endpoint: Endpoint, job: Job, setting: Setting) -> float:
    body = request_body(job.input_ids, job.options(setting), max_new_tokens=1)
    endpoint.flush()
    start = time.perf_counter()
    answer = endpoint.run(endpoint.ask(body))
    seconds = time.perf_counter() - start
    report = check_report(answer["meta_info"], setting)
    if report["early_cached_tokens"]:
        raise RuntimeError(f"{setting.name}: {report['early_cached_tokens']} tokens were cached: something else runs")
    return seconds
