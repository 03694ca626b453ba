"""Every prompt under every setting, many requests at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.quality.answers import Answer, Answers
from benchmarks.quality.endpoints import Endpoint, request_body
from benchmarks.quality.settings import Setting
from benchmarks.quality.turns import turn_key

TOP_LOGPROBS = 32  # of the first token, where they are asked for


class Job(NamedTuple):
    """One prompt. options: `custom_params.claa` for a setting. settings: those not answered yet, dense first.

    turns: questions of its chat. going_on: the ids of the next turn, after the answers to the first ones.
    """

    key: str
    input_ids: list[int]
    max_new_tokens: int
    logprobs: bool
    options: Callable[[Setting], dict[str, Any]]
    settings: list[Setting]
    turns: int = 1
    going_on: Callable[[Sequence[str]], list[int]] | None = None


async def ask_all(
    endpoint: Endpoint, jobs: Sequence[Job], answers: Answers, in_flight: int, until: float | None = None
) -> None:
    """Ask for everything and add it to `answers`; at most `in_flight` requests at a time.

    Of each prompt, dense and the first pruned request go first: the others find its early layers in the prefix cache.
    until: value of time.monotonic() after which no prompt is begun.
    Raises the first error; what was answered before it is kept.
    """
    slots, waiting = asyncio.Semaphore(in_flight), iter(jobs)
    total = sum(len(job.settings) * job.turns for job in jobs)
    with tqdm(total=total, desc="answers", unit="request", smoothing=0.05) as progress:

        async def one(job: Job, setting: Setting) -> None:
            """All turns, each after the one before; what is known of an earlier run is not asked again."""
            said: list[str] = []
            for turn in range(1, job.turns + 1):
                answer = None if _missing(answers, job, setting, turn) else answers.known[_place(job, setting, turn)]
                if answer is None:
                    async with slots:
                        answer = await _ask(endpoint, job, setting, said)
                    answers.add(answer)
                said.append(answer.text)
                progress.update()

        async def work() -> None:
            for job in waiting:
                if until is not None and time.monotonic() > until:
                    return
                for together in _in_turn(job.settings):
                    async with asyncio.TaskGroup() as group:
                        for setting in together:
                            group.create_task(one(job, setting))

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(work())


def _in_turn(settings: Sequence[Setting]) -> Iterator[Sequence[Setting]]:
    """What may be sent at once: all dense requests and one pruned, then the others."""
    pruned = [setting for setting in settings if not setting.dense]
    yield [*(setting for setting in settings if setting.dense), *pruned[:1]]
    yield pruned[1:]


async def _ask(endpoint: Endpoint, job: Job, setting: Setting, said: Sequence[str]) -> Answer:
    logprobs = TOP_LOGPROBS if job.logprobs and not said else 0
    input_ids = job.going_on(said) if job.going_on and said else job.input_ids
    body = request_body(input_ids, job.options(setting), job.max_new_tokens, logprobs)
    answer = await endpoint.ask(body, job.key)
    meta = answer["meta_info"]
    report = check_report(meta, setting)
    first = [(token, round(value, 4)) for value, token, _ in meta["output_top_logprobs"][0]] if logprobs else None
    return Answer(
        *(turn_key(job.key, 1 + len(said)), setting.name, answer["text"]),
        *(report["prompt_tokens"], report["kept_tokens"], first),
        cached=report.get("early_cached_tokens"),
        computed=report.get("late_computed_tokens"),
        ranker=report.get("ranker"),
    )


def check_report(meta: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """CLAA's report in `meta`. Raises RuntimeError if the request did not run as the setting says."""
    report = meta.get("claa")
    if report is None:
        raise RuntimeError("the answer has no report of CLAA: start the server with --enable-claa")
    if report["pruned"] == setting.dense:
        reason = report.get("reason", "it was pruned")
        raise RuntimeError(
            f"{setting.name}: a prompt of {report['prompt_tokens']} tokens ran otherwise: {reason}. "
            "Start the server with --claa-min-prompt-tokens 0 and room for the prompt and its late slots"
        )
    if not setting.dense and report["keep_rate"] not in (None, setting.keep_rate):  # None: positions were given
        raise RuntimeError(f"{setting.name}: ran at keep rate {report['keep_rate']}")
    return report


def pending(job: Job, settings: Iterable[Setting], answers: Answers) -> list[Setting]:
    """The settings under which a turn of the job is not answered yet, or its first only without log probabilities."""
    turns = range(1, job.turns + 1)
    return [setting for setting in settings if any(_missing(answers, job, setting, turn) for turn in turns)]


def _place(job: Job, setting: Setting, turn: int) -> tuple[str, str]:
    return turn_key(job.key, turn), setting.name


def _missing(answers: Answers, job: Job, setting: Setting, turn: int) -> bool:
    known = answers.known.get(_place(job, setting, turn))
    return known is None or (turn == 1 and job.logprobs and known.first is None)
