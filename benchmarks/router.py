"""Whether SGLang's router finds the caches of pruned servers as it finds those of stock ones.

    pip install sglang-router
    python -m benchmarks.router [--quick] [--out benchmarks/results/router.json]

Two stock servers on the CPU engine stand behind the router with its cache-aware policy, and then two pruned ones. Then
each pair is emptied and gets the same behind the router's round robin, which says what the policy is worth.

All get the same requests: several groups share a long prefix each, and every round asks one short question of each
group, in an order that is shuffled with a seed. A few requests of a round run at a time, and a round ends before the
next begins. One at a time would show nothing: the router gives a text that it does not know to the server with the
fewest requests under way, and of two idle servers it always takes the same one. A server's name is its weight version,
which SGLang returns with every answer, so that each answer says who gave it.

The hit rate is cached tokens of all prompt tokens. A prefix is found if the cache had all of it, or all of the prompt
but the window: a pruned request computes the window even on a hit, so its rate is a little lower. The router keeps a
tree of the texts that it has sent and knows nothing of what a server has kept. No profile is used, as a window shorter
than the questions would not show.

The router may be installed in a folder of its own: `pip install --no-deps --target .cache/router sglang-router` and
`--router-from .cache/router`. The exit status is 1 if a request was not pruned as asked, if a pair of servers found no
prefix, if one server of a pair got no request, if the pruned pair found fewer prefixes than the stock pair, if a hit
left less than the window, or if round robin found as many.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.cpu_cost import ROOT
from benchmarks.tiny_model import build_with_tokenizer
from benchmarks.traffic import MODELS, provenance
from claa_sglang.tasks.words import words
from claa_sglang.tools import small_model
from claa_sglang.tools.cpu_env import cpu_environment
from claa_sglang.tools.servers import CPU_FLAGS, ONE_THREAD, START_TIMEOUT, Server, free_port, launched

RESULT = Path(__file__).resolve().parent / "results" / "router.json"
CLAA = (
    *("--enable-claa", "--claa-profile", "none"),
    *("--claa-policy", "always", "--claa-min-prompt-tokens", "0", "--claa-finish", "off"),
)
PAIRS: dict[str, tuple[str, ...]] = {"stock": (), "pruned": CLAA}
SERVERS = ("first", "second")
POLICY, CONTROL = "cache_aware", "round_robin"
WINDOW = 32  # tokens at the end of a prompt, which a pruned request always computes; the default without a profile
PREFIX_WORDS, QUESTION_WORDS = 600, 6
NEW_TOKENS = 4


class NoRouter(RuntimeError):
    """SGLang's router is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Asked:
    """One request and what its answer said."""

    group: int
    server: str
    prompt: int  # tokens
    cached: int  # tokens
    pruned: bool


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        router = router_version(args.router_from)
    except NoRouter as missing:
        print(missing, file=sys.stderr)
        return 2
    small = small_model.prepare(ROOT / small_model.DEFAULT_DIR)
    prompts = prompts_of(args.groups, args.rounds, args.seed)
    prefixes = prefix_tokens(prompts, small)
    with tempfile.TemporaryDirectory(prefix="claa-router-") as temp:
        model = build_with_tokenizer(Path(temp), small) if args.model == "tiny" else small
        answers = {name: measure(model, name, prompts, args) for name in PAIRS}
    policies = {
        policy: {name: summary(answers[name][policy], prefixes) for name in PAIRS} for policy in (POLICY, CONTROL)
    }
    failures = failures_of(policies[POLICY], policies[CONTROL])
    show(policies, failures)
    made = provenance("benchmarks.router", argv)
    record = {
        **{name: made[name] for name in ("command", "date", "versions", "cpu", "cores")},
        "model": args.model,
        "seed": args.seed,
        "together": args.together,
        "flags": {name: list(flags) for name, flags in PAIRS.items()},
        "prefix tokens, by group": prefixes,
        "by policy": policies,
        "failures": failures,
        "samples": {
            f"{name}, {policy}": [list(asdict(one).values()) for one in asked]
            for name, by_policy in answers.items()
            for policy, asked in by_policy.items()
        },
        "columns of samples": list(Asked.__dataclass_fields__),
    }
    record["versions"]["sglang-router"] = router
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(failures))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router", description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=8, help="prefixes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="questions of each group (default: %(default)s)")
    parser.add_argument("--together", type=int, default=4, help="requests at a time (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three groups, three rounds, the tiny model")
    parser.add_argument("--model", default=small_model.NAME, choices=MODELS, help="default: %(default)s")
    parser.add_argument("--router-from", type=Path, help="folder that sglang-router is installed in (pip's --target)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.quick:
        args.groups, args.rounds, args.model = 3, 3, "tiny"
    return args


def router_version(folder: Path | None) -> str:
    """Of the router in `folder`, or in this environment without one. Raises NoRouter."""
    path = sys.path if folder is None else [str(folder)]
    for found in metadata.distributions(name="sglang-router", path=path):
        return found.version
    where = "in this environment" if folder is None else f"in {folder}"
    raise NoRouter(f"sglang_router is not installed {where}: pip install sglang-router")


# --- what is asked ---


def prompts_of(groups: int, rounds: int, seed: int) -> list[list[tuple[int, str]]]:
    """By round: group and text of every request, in the order in which they are sent."""
    rng = random.Random(seed)
    prefixes = [" ".join(words(rng, PREFIX_WORDS)) for _ in range(groups)]

    def prompt(group: int) -> str:
        return f"{prefixes[group]}.\n\nWhat of {', '.join(words(rng, QUESTION_WORDS))}?"

    return [[(group, prompt(group)) for group in rng.sample(range(groups), groups)] for _ in range(rounds)]


def prefix_tokens(prompts: Sequence[Sequence[tuple[int, str]]], model: Path) -> list[int]:
    """By group: the tokens that all of its prompts begin with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    by_group: dict[int, list[list[int]]] = {}
    for group, text in chain(*prompts):
        by_group.setdefault(group, []).append(tokenizer.encode(text))
    return [len(os.path.commonprefix(by_group[group])) for group in sorted(by_group)]


# --- who answers ---


def measure(
    model: Path, name: str, prompts: Sequence[Sequence[tuple[int, str]]], args: argparse.Namespace
) -> dict[str, list[Asked]]:
    """By policy: the requests through a fresh router to a pair of servers that has nothing cached."""
    asked: dict[str, list[Asked]] = {POLICY: [], CONTROL: []}
    with pair(model, PAIRS[name]) as servers, ThreadPoolExecutor(args.together) as clients:
        for policy, answers in asked.items():
            for running in servers:
                running.flush()
            with router_before(servers, policy, args.router_from) as router:
                for one_round in tqdm(prompts, desc=f"{name}, {policy}", unit="round"):
                    answers += clients.map(lambda prompt: send(router, *prompt), one_round)  # noqa: B023
    return asked


@contextlib.contextmanager
def pair(model: Path, flags: Sequence[str]) -> Iterator[list[Server]]:
    """One server for each name in SERVERS, started together."""
    environment = {**cpu_environment(), **ONE_THREAD}
    common = ("--model-path", str(model), *CPU_FLAGS, *flags)
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(launched(*common, "--weight-version", name, env=environment)) for name in SERVERS
        ]
        for running in started:
            running.wait()
        yield started


@contextlib.contextmanager
def router_before(servers: Sequence[Server], policy: str, folder: Path | None) -> Iterator[Server]:
    command = (sys.executable, "-m", "sglang_router.launch_router")
    # The default port of its metrics is a fixed one, which another router may have.
    options = ("--policy", policy, "--prometheus-port", str(free_port()))
    paths = [str(folder.resolve())] if folder else []
    path = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    urls = [running.url for running in servers]
    with launched("--worker-urls", *urls, *options, command=command, env={"PYTHONPATH": path}) as router:
        router.wait()
        wait_for_workers(router)
        yield router


def wait_for_workers(router: Server) -> None:
    """Until the router has found every server; it answers before. Raises TimeoutError."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        answer = router.get("/workers")
        if answer.status_code == 200 and sum(w["is_healthy"] for w in answer.json()["workers"]) == len(SERVERS):
            return
        time.sleep(0.5)
    raise TimeoutError(f"the router does not know its servers: {answer.text}\n{router.log()[-2000:]}")


def send(router: Server, group: int, text: str) -> Asked:
    meta = router.generate(text=text, sampling_params={"max_new_tokens": NEW_TOKENS, "ignore_eos": True})["meta_info"]
    pruned = meta.get("claa", {}).get("pruned", False)
    return Asked(group, meta["weight_version"], meta["prompt_tokens"], meta["cached_tokens"], pruned)


# --- what it says ---


def summary(asked: Sequence[Asked], prefixes: Sequence[int]) -> dict[str, Any]:
    """Of one pair of servers. A group's first request finds nothing and is not among those that could."""
    found, could, seen = 0, 0, set()
    for one in asked:
        if one.group in seen:
            could += 1
            found += one.cached >= min(prefixes[one.group], one.prompt - WINDOW)
        seen.add(one.group)
    computed = [one.prompt - one.cached for one in asked if one.cached]
    servers_of = {group: {one.server for one in asked if one.group == group} for group in seen}
    return {
        "requests": len(asked),
        "pruned": sum(one.pruned for one in asked),
        "hit rate": round(_rate(asked), 4),
        "prefix found": found,
        "later requests": could,
        "share of prefixes found": round(found / could, 4) if could else None,
        "tokens computed on a hit": [min(computed), max(computed)] if computed else None,
        "groups": len(seen),
        "groups on more than one server": sum(len(servers) > 1 for servers in servers_of.values()),
        "servers": {
            name: {
                "requests": len(its := [one for one in asked if one.server == name]),
                "groups": sum(name in servers for servers in servers_of.values()),
                "prompt tokens": sum(one.prompt for one in its),
                "cached tokens": sum(one.cached for one in its),
                "hit rate": round(_rate(its), 4),
            }
            for name in sorted({one.server for one in asked})
        },
    }


def _rate(asked: Sequence[Asked]) -> float:
    """Cached tokens of prompt tokens; 0 of no requests."""
    return sum(one.cached for one in asked) / max(1, sum(one.prompt for one in asked))


def failures_of(pairs: dict[str, dict[str, Any]], control: dict[str, dict[str, Any]]) -> list[str]:
    """In words, what is wrong, if anything is, of pairs behind POLICY and behind CONTROL."""
    failures = []
    for name, pair in pairs.items():
        wanted = pair["requests"] if name == "pruned" else 0
        if pair["pruned"] != wanted:
            failures.append(f"{name}: {pair['pruned']} requests were pruned, not {wanted}")
        if not pair["prefix found"]:
            failures.append(f"nothing was shown: {name} servers found no prefix")
        elif control[name]["prefix found"] >= pair["prefix found"]:
            failures.append(f"nothing was shown: {name} servers found as many prefixes behind {CONTROL}")
        if len(pair["servers"]) < len(SERVERS):
            failures.append(f"nothing was shown: of the {name} servers, only {', '.join(pair['servers'])} was asked")
    if pairs["pruned"]["prefix found"] < pairs["stock"]["prefix found"]:
        failures.append("pruned servers found fewer prefixes than stock ones")
    if (computed := pairs["pruned"]["tokens computed on a hit"]) and computed[0] < WINDOW:
        failures.append(f"a pruned hit computed {computed[0]} tokens, fewer than the window")
    return failures


def show(policies: dict[str, dict[str, dict[str, Any]]], failures: Sequence[str]) -> None:
    console = Console()
    table = Table("policy", "servers", "hit rate", "prefixes found", "groups", "on both servers", "requests")
    for policy, pairs in policies.items():
        for name, one in pairs.items():
            table.add_row(
                policy,
                name,
                f"{one['hit rate']:.3f}",
                f"{one['prefix found']} of {one['later requests']}",
                str(one["groups"]),
                str(one["groups on more than one server"]),
                " + ".join(str(its["requests"]) for its in one["servers"].values()),
            )
    console.print(table)
    for failure in failures:
        console.print(failure, style="red", markup=False)
    console.print("[red]FAILED" if failures else "[green]the router finds pruned prefixes as it finds stock ones")


if __name__ == "__main__":
    raise SystemExit(main())
