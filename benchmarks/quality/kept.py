"""Is the kept set of a prompt the same when its early layers come from the prefix cache, and does an answer change?

In bf16 the scores of a prompt differ by rounding with the rows that are computed together, and a prefix hit computes
fewer. A token at the budget's edge may then change places with another.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec
from tqdm import tqdm

from benchmarks.quality.asking import Job, check_report
from benchmarks.quality.endpoints import Endpoint, request_body
from benchmarks.quality.settings import Setting
from claa_sglang.tasks.grade import grade
from claa_sglang.tasks.record import Prompt

# What is cached before the prompt is asked again, as a share of its tokens: half of it, or all, as in a repeat.
HITS = {"half": 0.5, "all": 1.0}


class KeptSets(msgspec.Struct, frozen=True):
    """Prompts of one length under one setting, cold and with a prefix hit.

    hit: one of HITS. cached: median of early_cached_tokens. kept: median of kept tokens. differing: per prompt, kept
    tokens of the cold run that the other dropped; median and most: of them. same_text, same_grade: prompts with the
    same answer to the letter, and with the same grade.
    """

    length: int
    ranker: str
    keep_rate: float
    hit: str
    prompts: int
    cached: float
    kept: float
    differing: list[int]
    median: float
    most: int
    same_text: int
    same_grade: int


class _Run(msgspec.Struct, frozen=True):
    text: str
    grade: float
    kept: frozenset[int]
    cached: int


def measure(
    endpoint: Endpoint, asked: dict[int, list[tuple[Prompt, Job]]], settings: Sequence[Setting], count: int
) -> list[KeptSets]:
    """`count` prompts of each length, one request at a time. settings: pruned ones, ranked by the server."""
    found = []
    for length, pairs in sorted(asked.items()):
        graded = [pair for pair in pairs if pair[0].answers]
        chosen = random.Random(0).sample(graded, min(count, len(graded)))
        for setting in settings:
            runs = [
                _runs(endpoint, prompt, job, setting) for prompt, job in tqdm(chosen, desc=f"kept sets at {length}")
            ]
            found += [_compare(length, setting, hit, runs) for hit in HITS if runs]
    return found


def _runs(endpoint: Endpoint, prompt: Prompt, job: Job, setting: Setting) -> dict[str, _Run]:
    endpoint.flush()
    runs = {"cold": _ask(endpoint, prompt, job, setting)}
    if runs["cold"].cached:
        raise RuntimeError(f"{runs['cold'].cached} tokens were cached after a flush: something else runs")
    for hit, share in HITS.items():
        endpoint.flush()
        before = job.input_ids[: int(share * len(job.input_ids))]
        endpoint.run(endpoint.ask(request_body(before, job.options(setting), max_new_tokens=1)))
        runs[hit] = _ask(endpoint, prompt, job, setting)
        if not runs[hit].cached:
            raise RuntimeError("nothing was cached of a prefix just sent: start the server with its radix cache")
    return runs


def _ask(endpoint: Endpoint, prompt: Prompt, job: Job, setting: Setting) -> _Run:
    options: dict[str, Any] = {**job.options(setting), "return_kept": True}
    answer = endpoint.run(endpoint.ask(request_body(job.input_ids, options, job.max_new_tokens)))
    report = check_report(answer["meta_info"], setting)
    right = grade(answer["text"], prompt.answers, prompt.exact)
    return _Run(answer["text"], right, frozenset(report["kept"]), report["early_cached_tokens"])


def _compare(length: int, setting: Setting, hit: str, runs: Sequence[dict[str, _Run]]) -> KeptSets:
    pairs = [(run["cold"], run[hit]) for run in runs]
    differing = [len(cold.kept - warm.kept) for cold, warm in pairs]
    return KeptSets(
        length,
        setting.ranker,
        setting.keep_rate,
        hit,
        prompts=len(pairs),
        cached=statistics.median(warm.cached for _, warm in pairs),
        kept=statistics.median(len(cold.kept) for cold, _ in pairs),
        differing=differing,
        median=statistics.median(differing),
        most=max(differing),
        same_text=sum(cold.text == warm.text for cold, warm in pairs),
        same_grade=sum(cold.grade == warm.grade for cold, warm in pairs),
    )
