"""Does pruning cost answers? Dense and pruned runs of the same prompts on the same server, compared pair by pair.

    claa-sglang tasks --model MODEL --count 200 --lengths 1024 2048 4096 --out prompts.jsonl.xz
    python -m benchmarks.eval_quality prompts.jsonl.xz --engine MODEL --profile PROFILE --time --out quality.json
    python -m benchmarks.eval_quality prompts.jsonl.xz --url http://127.0.0.1:30000 --rankers claa fastkv

Every prompt is asked dense and, for every ranker and keep rate, pruned, by the switch that each request has. Per task,
source of text, length, ranker and keep rate: accuracy; its difference to dense, paired, and the first ranker's to it;
McNemar's exact test; how often the answer is dense's to the letter; and the KL divergence of the first token, a lower
bound from the likeliest tokens (`quality.statistics`). `--time` adds TTFT, one request at a time. Answers are appended
to a file as they come: started again, the script asks only for what is missing; without --url and --engine it counts
what is in `--answers`.

A ranking made elsewhere, such as an oracle's, comes from a file: `--given oracle=rankings.jsonl`.
`benchmarks.eval_quality_plot` draws the frontier from the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.quality import tables, timing
from benchmarks.quality.answers import Answers, Known, read
from benchmarks.quality.asking import TOP_LOGPROBS, Job, ask_all, pending
from benchmarks.quality.endpoints import EngineEndpoint, UrlEndpoint
from benchmarks.quality.settings import DEFAULT_RANKER, Rankings, Setting, load_rankings, options, settings
from benchmarks.quality.statistics import ALL, EVERY_LENGTH, cells
from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.record import Prompt, load

RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    prompts = list({prompt.key: prompt for prompt in load(args.prompts)}.values())
    rankings = load_rankings(args.given)
    wanted = settings([*args.rankers, *rankings], args.keep_rates)
    if args.url or args.engine:
        known, run, times = ask(args, prompts, wanted, rankings)
    else:
        known, facts = read(args.answers)
        run, times = {"count only": True, **facts}, []
    found = cells(prompts, known, wanted)
    tables.show(found, times)
    counted = {cell.length: cell.n for cell in found if cell.task == cell.source == ALL and cell.length != EVERY_LENGTH}
    record = {
        "command": "python -m benchmarks.eval_quality " + " ".join(argv),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **run,
        "prompts": {"count": len(prompts), "tasks": dict(Counter(prompt.task for prompt in prompts))},
        "answered under every setting": sum(counted.values()),
        "in_flight": args.in_flight,
        "first_token_top": TOP_LOGPROBS,
        "ttft": msgspec.to_builtins(times),
        "cells": msgspec.to_builtins(found),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text_of(record))
    return 0


def text_of(record: dict[str, Any]) -> str:
    """As JSON, a line for each entry of a list, and floats to seven digits: there are thousands of cells."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.7g}")
        if isinstance(value, dict):
            return {name: rounded(inner) for name, inner in value.items()}
        return [rounded(inner) for inner in value] if isinstance(value, list) else value

    def lines(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value)
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"

    return (
        "{\n " + ",\n ".join(f"{json.dumps(name)}: {lines(value)}" for name, value in rounded(record).items()) + "\n}\n"
    )


def ask(
    args: argparse.Namespace, prompts: Sequence[Prompt], wanted: Sequence[Setting], rankings: Rankings
) -> tuple[Known, dict[str, Any], list[timing.Ttft]]:
    """All answers, those of earlier runs too; what is to be on record about the run; TTFT with `--time`."""
    began, began_at = time.perf_counter(), time.monotonic()
    with contextlib.closing(endpoint_of(args)) as endpoint:
        info = endpoint.info()
        answers = Answers(args.answers, facts_of(info))
        jobs = jobs_of(prompts, info, wanted, rankings, answers, args)
        missing = [job for job in jobs if job.settings]
        print(f"{len(jobs)} prompts, {len(wanted)} settings; {len(missing)} prompts still to ask", flush=True)
        asked = time.perf_counter()
        with contextlib.closing(answers), only_the_first():
            until = None if args.seconds is None else began_at + args.seconds
            for part in in_turn(missing, args.rankers[0]):
                endpoint.run(ask_all(endpoint, part, answers, args.in_flight, until))
        seconds = {"start": round(asked - began, 1), "answers": round(time.perf_counter() - asked, 1)}
        times = []
        if args.time:
            by_length = defaultdict(list)
            for prompt, job in zip(prompts, jobs, strict=True):
                by_length[prompt.length or len(job.input_ids)].append(job)
            times = timing.measure(endpoint, by_length, wanted, args.rounds)
        return answers.known, {"device": endpoint.device, **facts_of(info), "seconds": seconds}, times


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eval_quality", description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSONL of `claa-sglang tasks`, or your own; may be .xz or .gz")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", nargs="+", help="of running servers with --enable-claa, alike")
    where.add_argument(
        "--engine", metavar="MODEL", help="start an engine with this model; neither: count --answers, ask nothing"
    )
    parser.add_argument("--profile", help="--claa-profile of the engine (default: none)")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="more options of the engine, as JSON")
    parser.add_argument("--rankers", nargs="+", default=[DEFAULT_RANKER], help="default: %(default)s")
    parser.add_argument("--given", nargs="+", default=[], metavar="NAME=FILE", help="rankings made elsewhere")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="begin no prompt after this time; count what there is")
    parser.add_argument("--in-flight", type=int, default=256, help="requests at a time (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="for prompts that do not say (default: %(default)s)"
    )
    parser.add_argument(
        "--kl-prompts",
        type=int,
        default=50,
        help="first-token log probabilities for so many prompts per task, source and length (default: %(default)s)",
    )
    parser.add_argument("--time", action="store_true", help="measure TTFT as well")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, at least 5 (default: %(default)s)")
    parser.add_argument("--answers", type=Path, help="file the answers are kept in (default: beside --out)")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not (args.url or args.engine or args.answers):
        parser.error("give --url or --engine to ask, or --answers to count what was answered")
    if args.rounds < 5:
        parser.error("--rounds: at least 5")
    args.answers = args.answers or args.out.with_suffix(".answers.jsonl")
    return args


def in_turn(jobs: Sequence[Job], ranker: str) -> list[list[Job]]:
    """All prompts dense and by `ranker` first, then by the others, each time in a random order: a run that is cut short
    has the comparison that matters most, and something of every cell."""
    first = [job._replace(settings=[s for s in job.settings if s.dense or s.ranker == ranker]) for job in jobs]
    others = [job._replace(settings=[s for s in job.settings if not s.dense and s.ranker != ranker]) for job in jobs]
    return [
        random.Random(0).sample(part, len(part)) for part in ([j for j in p if j.settings] for p in (first, others))
    ]


def endpoint_of(args: argparse.Namespace) -> EngineEndpoint | UrlEndpoint:
    if args.url:
        return UrlEndpoint(args.url, args.in_flight)
    more = {**args.engine_args, **({"claa_profile": args.profile} if args.profile else {})}
    return EngineEndpoint(args.engine, more)


def facts_of(info: dict[str, Any]) -> dict[str, Any]:
    """What answers depend on: the model, CLAA's configuration, and versions. Holds no path."""
    names = ("claa-sglang", "sglang", "torch", "transformers", "scipy")
    kept = ("dtype", "attention_backend", "chunked_prefill_size", "context_length")
    config = info["claa"]["config"]
    return {
        "model": Path(info["model_path"]).name,
        "claa": {**config, "profile": Path(config["profile"]).name if config["profile"] else None},
        "server": {name: info.get(name) for name in kept},
        "versions": {name: _version(name) for name in names} | {"python": platform.python_version()},
    }


def jobs_of(
    prompts: Sequence[Prompt],
    info: dict[str, Any],
    wanted: Sequence[Setting],
    rankings: dict[str, dict[str, list[int]]],
    answers: Answers,
    args: argparse.Namespace,
) -> list[Job]:
    """A job per prompt, with what is still to be asked."""
    tokenizer = None
    if any(prompt.input_ids is None for prompt in prompts):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(info["tokenizer_path"] or info["model_path"])
    window, of_group, jobs = info["claa"]["config"]["window"], Counter(), []
    for prompt in prompts:
        ids = token_ids(prompt, tokenizer)
        group = prompt.task, prompt.source, prompt.length
        logprobs = of_group[group] < args.kl_prompts
        of_group[group] += 1
        how = partial(options, key=prompt.key, tokens=len(ids), window=window, rankings=rankings)
        todo = pending(wanted, prompt.key, answers, logprobs)
        jobs.append(Job(prompt.key, ids, prompt.max_new_tokens or args.max_new_tokens, logprobs, how, todo))
    return jobs


@contextlib.contextmanager
def only_the_first():
    """One error of many that run together says enough."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _version(name: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None


if __name__ == "__main__":
    raise SystemExit(main())
