"""One run on a GPU host that gives accuracy, TTFT, rankers, turns and kept sets of some models, before a deadline.

    python -m benchmarks.answers_run --models DIR DIR --out OUT --seconds 540 --gpus 4

A plan (`benchmarks.answers.plan`, `--plan`) says what is asked of which model. In order:

1. Everything that will be needed is looked at: models, packages, flags, ports, disk. What is wrong is printed, and
   nothing starts. `--check-only` ends here; with `--cpu` it tries a plan where there is no GPU.
2. All servers start side by side: of each model one with CLAA on each of its GPUs, and stock on the first of them.
   One that does not start ends the run at once, with the end of its log.
3. Meanwhile prompts are made in many processes, in two forms: with the beginning of the answer, and as a chat ends.
4. The first GPU of a model times it pruned, dense and stock with nothing else on the card; the last asks several
   rankers and chats; all then share the model's prompts: half of the longest, all shorter ones, the rest.
   A plan that is `quiet` measures all times first, with nothing else asked on the whole host.
5. Whatever happened, OUT gets what there is: MODEL.json and MODEL.png, `raw/` with all answers and an index that
   `eval_quality --index` counts again, and `logs/`.

Exit status: 0 if nothing failed, 1 if something did (`failures` in each record), 2 if a check did.
`--cpu` runs on SGLang's CPU engine: a plan of a few short prompts tries the whole tool.

What the default plan takes on 4 H100: servers 110 to 150 s where no kernel was ever compiled, 13,200 prompts about a
minute with 60 processes meanwhile, and 0.4 s of GPU for 30,000 tokens dense and at one keep rate.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.answers import checks, plan, prompts
from benchmarks.answers.clock import Clock
from benchmarks.answers.plan import Plan, PlanError
from benchmarks.answers.running import Run, run

FAILED, REFUSED = 1, 2
MOST_PROCESSES = 60


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        whole = plan.load(args.plan)
        clock = Clock(args.seconds, whole.finish)
        paths = {path.name: path for path in map(Path.resolve, args.models)}
        wanted = only(whole, list(paths))
        command = "python -m benchmarks.answers_run " + shlex.join(argv)
        out = args.out.resolve()
        with tempfile.TemporaryDirectory(prefix="claa-answers-") as temp:
            told = Run(wanted, paths, out, Path(temp).resolve(), args.gpus, args.cpu, command)
            checks.quick(wanted, paths, out, told.temp, args.seconds, args.gpus, args.cpu)
            checks.commands(wanted, args.gpus)
            with prompts.pool(args.processes) as pool:  # ended at once when the block ends
                checks.slow(wanted, paths, args.gpus, args.cpu, pool, max(1.0, clock.left_to_ask()))
                clock.say("everything needed is there")
                if args.check_only:
                    return 0
                failures = run(told, clock, pool)
    except (PlanError, checks.CheckError) as error:
        print(f"nothing was started:\n{error}", file=sys.stderr)
        return REFUSED
    clock.say(f"{out}: written" + (f"; {len(failures)} failures" if failures else ""))
    return FAILED if failures else 0


def only(whole: Plan, names: Sequence[str]) -> Plan:
    """The plan for these models. Raises PlanError if it has not all of them."""
    if missing := [name for name in names if name not in whole.models]:
        known = ", ".join(whole.models)
        raise PlanError(f"the plan has no model {missing[0]!r}: it has {known}, by the name of the directory")
    return msgspec.structs.replace(whole, models={name: whole.models[name] for name in names})


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answers_run", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", required=True, metavar="DIR", help="directories of models")
    parser.add_argument("--out", type=Path, required=True, help="directory for records, answers and logs")
    parser.add_argument("--seconds", type=float, required=True, help="until everything is written")
    parser.add_argument("--gpus", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--plan", default=plan.DEFAULT, help="JSON file, or a name (default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="SGLang's CPU engine, with --gpus lanes")
    parser.add_argument(
        "--check-only", action="store_true", help="start nothing; also on a machine without a GPU, with --cpu"
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--processes",
        type=int,
        default=min(MOST_PROCESSES, max(1, cores - 4)),
        help="that make prompts (default: cores less 4, at most %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.gpus < 1 or args.processes < 1:
        parser.error("--gpus and --processes: at least 1")
    return args


def _terminated(signum: int, frame: object) -> None:
    """What a killed run has is written as at the deadline."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    raise SystemExit(main())
