"""Does pruning cost answers? Dense and pruned runs of the same prompts on the same server, compared pair by pair.

    claa-sglang tasks --model MODEL --count 200 --lengths 1024 2048 4096 --out prompts.jsonl.xz
    python -m benchmarks.eval_quality prompts.jsonl.xz --engine MODEL --profile PROFILE --time --out quality.json
    python -m benchmarks.eval_quality prompts.jsonl.xz --url http://127.0.0.1:30000 --rankers claa fastkv

Every prompt is asked dense and, for every ranker and keep rate, pruned, by the switch that each request has. Per task,
length, ranker and keep rate: accuracy; its difference to dense, paired, and the first ranker's to it; McNemar's exact
test; over all tasks also how often the answer is dense's to the letter, and the KL divergence of the first token, a
lower bound from the likeliest tokens (`quality.statistics`). `--sources-too` has all of it per source of text as well.
A table says of each task whether it is within one point of dense (`quality.verdicts`). Answers are appended to a file
as they come: started again, the script asks only for what is missing; without --url and --engine it counts what is in
`--answers`, and `--index` says that an index (`quality.index`) stands in for the prompts.

    python -m benchmarks.eval_quality prompts.jsonl.xz --url URL1 URL2 --time --stock-url URL3 --turns 3 --kept-sets 12

`--time` adds TTFT, one request at a time, on the first server alone and after all answers; `--stock-url` times a server
without CLAA in the same rounds, which must run on the card of the first. `--turns` asks the follow-up questions of each
prompt in the same chat (`quality.turns`). `--kept-sets` compares what is kept cold and with a prefix hit
(`quality.kept`).

A ranking made elsewhere, such as an oracle's, comes from a file: `--given oracle=rankings.jsonl`.
`benchmarks.eval_quality_plot` draws the frontier from the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.quality import index, kept, recording, tables, timing
from benchmarks.quality.answers import Answers, Known, read
from benchmarks.quality.asking import TOP_LOGPROBS, Job, ask_all, pending
from benchmarks.quality.endpoints import EngineEndpoint, UrlEndpoint
from benchmarks.quality.recording import facts_of
from benchmarks.quality.settings import DEFAULT_RANKER, Rankings, Setting, load_rankings, options, settings
from benchmarks.quality.statistics import cells
from benchmarks.quality.turns import conversation, with_turns
from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.record import Prompt, load

RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    loaded = {prompt.key: prompt for prompt in (index.load if args.index else load)(args.prompts)}
    prompts = with_turns(list(loaded.values()), args.turns)
    if len(prompts) < len(loaded):
        print(f"{len(loaded) - len(prompts)} prompts without {args.turns} turns are left out", flush=True)
    rankings = load_rankings(args.given)
    wanted = settings([*args.rankers, *rankings], args.keep_rates, args.decode_both_ways)
    if args.url or args.engine:
        known, run, measured = ask(args, prompts, wanted, rankings)
    else:
        known, facts = read(args.answers)
        run, measured = {"count only": True, **facts}, Measured()
    found = [] if args.ask_only else cells(prompts, known, wanted, args.turns)
    tables.show(found, measured.times, measured.kept)
    record = {
        "command": "python -m benchmarks.eval_quality " + " ".join(argv),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **run,
        "in_flight": args.in_flight,
        "first_token_top": TOP_LOGPROBS,
        "ttft": msgspec.to_builtins(measured.times),
        "kept_sets": msgspec.to_builtins(measured.kept),
        **recording.counted(prompts, known, wanted, found, args.turns, args.sources_too),
    }
    recording.write(record, args.out)
    return 0


class Measured(NamedTuple):
    """What was measured besides the answers."""

    times: Sequence[timing.Ttft] = ()
    kept: Sequence[kept.KeptSets] = ()


def ask(
    args: argparse.Namespace, prompts: Sequence[Prompt], wanted: Sequence[Setting], rankings: Rankings
) -> tuple[Known, dict[str, Any], Measured]:
    """All answers, those of earlier runs too; what is to be on record about the run; and what else was measured.

    Nothing else runs while something is timed: answers come first.
    """
    began, began_at = time.perf_counter(), time.monotonic()
    with contextlib.ExitStack() as closed:
        endpoint = closed.enter_context(contextlib.closing(endpoint_of(args)))
        info = endpoint.info()
        stock = closed.enter_context(contextlib.closing(stock_of(args, info))) if args.stock_url else None
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
        by_length = defaultdict(list)
        for prompt, job in zip(prompts, jobs, strict=True):
            by_length[prompt.length or len(job.input_ids)].append((prompt, job))
        kept_sets, times = [], []
        if args.kept_sets:
            first = [one for one in wanted if one.ranker == args.rankers[0]]
            kept_sets = kept.measure(endpoint.alone(), by_length, first, args.kept_sets)
        if args.time:
            timed = {length: [job for _, job in pairs] for length, pairs in by_length.items()}
            times = timing.measure(endpoint.alone(), timed, wanted, args.rounds, stock)
        run = {"device": endpoint.device, **facts_of(info), "seconds": seconds}
        if stock is not None:
            run["stock"] = recording.server_of(stock.info())
            run["timed"] = "both over HTTP" if args.url else "stock over HTTP, the others in process"
        return answers.known, run, Measured(times, kept_sets)


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
    parser.add_argument("--index", action="store_true", help="PROMPTS is an index of prompts; it can only be counted")
    parser.add_argument("--ask-only", action="store_true", help="leave counting to another run")
    parser.add_argument("--rankers", nargs="+", default=[DEFAULT_RANKER], help="default: %(default)s")
    parser.add_argument("--given", nargs="+", default=[], metavar="NAME=FILE", help="rankings made elsewhere")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="default: %(default)s")
    parser.add_argument(
        "--decode-both-ways",
        action="store_true",
        help="of a server with --claa-decode-dense-layers: ask each also so that decoding reads the whole prompt",
    )
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
    parser.add_argument("--turns", type=int, default=1, help="questions per chat, with follow-ups (default: 1)")
    parser.add_argument(
        "--kept-sets",
        type=int,
        default=0,
        metavar="N",
        help="compare kept sets cold and with a prefix hit, for N prompts per length, by the first ranker",
    )
    parser.add_argument("--sources-too", action="store_true", help="have every source of text on record by itself")
    parser.add_argument("--time", action="store_true", help="measure TTFT as well")
    parser.add_argument("--stock-url", help="of a running server without --enable-claa, on the same card, to time")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, at least 5 (default: %(default)s)")
    parser.add_argument("--answers", type=Path, help="file the answers are kept in (default: beside --out)")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not (args.url or args.engine or args.answers):
        parser.error("give --url or --engine to ask, or --answers to count what was answered")
    if args.index and (args.url or args.engine):
        parser.error("--index: an index holds no prompts to ask; give the prompts, or --answers alone to count")
    if args.rounds < 5:
        parser.error("--rounds: at least 5")
    if args.turns < 1:
        parser.error("--turns: at least 1")
    if args.turns > 1 and args.given:
        parser.error("--given has no rankings of later turns: leave out --turns")
    if args.stock_url and not args.time:
        parser.error("--stock-url is only timed: give --time as well")
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


def stock_of(args: argparse.Namespace, info: dict[str, Any]) -> UrlEndpoint:
    """The stock server. Raises ValueError if it has another model or type of numbers; says what else differs."""
    stock = UrlEndpoint([args.stock_url], 1, claa=False)
    ours, theirs = ({"model": Path(one["model_path"]).name, **recording.server_of(one)} for one in (info, stock.info()))
    differ = [name for name in ours if ours[name] != theirs[name]]
    if {"model", "dtype"} & set(differ):
        stock.close()
        raise ValueError(f"{args.stock_url} differs in {', '.join(differ)}: start stock as the server with CLAA")
    if differ:
        print(f"stock differs in {', '.join(differ)}; both are on record", flush=True)
    return stock


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
        room = prompt.max_new_tokens or args.max_new_tokens
        job = Job(prompt.key, ids, room, logprobs, how, [], args.turns, partial(_ids_after, prompt, tokenizer))
        jobs.append(job._replace(settings=pending(job, wanted, answers)))
    return jobs


def _ids_after(prompt: Prompt, tokenizer: Any, said: Sequence[str]) -> list[int]:
    return token_ids(conversation(prompt, said), tokenizer)


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


if __name__ == "__main__":
    raise SystemExit(main())
