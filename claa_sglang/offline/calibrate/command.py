"""`claa-sglang calibrate`: the command line. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from claa_sglang.offline.calibrate.ranker_list import RANKERS, read
from claa_sglang.offline.calibrate.target import LONG_TASKS, PROMPT_TOKENS, CalibrationError, Target

TASKS = ("needle-number", "multi-key", "multi-value", "multi-query", "tracking", "passages", *LONG_TASKS)
KEEP_RATES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="directory or name of the model to calibrate")
    parser.add_argument("--out", type=Path, required=True, help="profile to write; servers of this user find a copy")
    text = parser.add_argument_group("prompts", "Generated, or yours: JSONL as in claa_sglang/tasks/record.py.")
    text.add_argument("--prompts", type=Path, help="file of prompts to choose on; needs --held-out")
    text.add_argument("--held-out", type=Path, help="file of prompts of other sources of text, to confirm the choice")
    text.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help="to generate (default: %(default)s)")
    text.add_argument("--sources", nargs="+", default=["prose"], help="of generated text (default: %(default)s)")
    text.add_argument("--held-out-sources", nargs="+", default=["repeated", "sentences"], help="default: %(default)s")
    text.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help="of generated prompts; a choice must hold at each (default: 1024 4096, or what the model takes)",
    )
    text.add_argument(
        "--form",
        choices=("both", "chat", "prefix"),
        default="both",
        help="how generated prompts end: as a chat does, with the beginning of an answer, or half of each (default)",
    )
    text.add_argument("--count", type=int, default=6, help="prompts per task, length and source (default: %(default)s)")
    text.add_argument("--seed", type=int, default=0, help="of the first generated prompt (default: %(default)s)")
    choice = parser.add_argument_group("choice")
    choice.add_argument(
        "--target",
        type=float,
        default=Target().mass,
        help="oracle mass to keep, of what the oracle itself keeps at --oracle-rate (default: %(default)s)",
    )
    choice.add_argument(
        "--oracle-rate", type=float, default=Target().reference_rate, help="see --target (default: %(default)s)"
    )
    choice.add_argument(
        "--needle-recall",
        type=float,
        default=Target().recall,
        help="share of the answers' tokens to keep, where prompts name needles; 0 for any (default: %(default)s)",
    )
    choice.add_argument(
        "--whole",
        type=float,
        default=Target().whole,
        help="share of prompts whose answer is kept to its last token; 0 for any (default: %(default)s)",
    )
    choice.add_argument(
        "--rankers",
        nargs="+",
        default=RANKERS,
        metavar="RANKER",
        help="to choose from, as --claa-ranker takes them: claa and last-query (default: %(default)s)",
    )
    choice.add_argument("--pool-kernel", help=argparse.SUPPRESS)
    choice.add_argument("--keep-rates", nargs="+", type=float, default=KEEP_RATES, help="default: %(default)s")
    choice.add_argument(
        "--prune-layers",
        nargs=2,
        type=int,
        metavar=("FIRST", "LAST"),
        help="default: L/4 to the last that is served",
    )
    choice.add_argument("--steps", type=int, choices=(1, 2), default=1, help="prune steps at most (default: 1)")
    choice.add_argument(
        "--prompt-tokens",
        type=int,
        help=f"length of the prompt whose TTFT is predicted (default: {PROMPT_TOKENS}, or what the model takes)",
    )
    choice.add_argument(
        "--cost-constants",
        nargs=4,
        type=float,
        metavar=("PASS", "ROW", "PAIR", "PRUNE"),
        help="seconds per layer of the machine that serves (default: measured on this one)",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--studies", type=Path, help="directory that keeps studied prompts, so that a run can be resumed")
    run.add_argument("--device", help="default: cuda if there is one, else cpu")
    run.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the model's; on cpu float32")


def run(args: argparse.Namespace) -> int:
    """Calibrate and write the profile. Raises CalibrationError, or the error of a part; nothing is written then."""
    _check(args)
    from claa_sglang.offline.calibrate import pipeline, profile
    from claa_sglang.offline.capture import CaptureError
    from claa_sglang.offline.records import RecordError

    try:
        made = pipeline.calibrate(args)
    except (CaptureError, RecordError) as error:
        raise CalibrationError(str(error)) from error
    profile.write(made, args.out)
    try:
        copy = profile.keep(made)
    except OSError as error:
        print(f"claa-sglang calibrate: no copy for servers of this user: {error}", file=sys.stderr)
        copy = None
    found = f", with a copy at {copy}, where a server of this model finds it with --enable-claa alone" if copy else ""
    print(f"{args.out}: written{found}; elsewhere serve it with --enable-claa --claa-profile {args.out}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse before the model is loaded what cannot work."""
    if (args.prompts is None) != (args.held_out is None):
        given, missing = ("--prompts", "--held-out") if args.held_out is None else ("--held-out", "--prompts")
        raise CalibrationError(f"{given} without {missing}: a choice counts for nothing before other text confirms it")
    if args.prompts is None and (both := set(args.sources) & set(args.held_out_sources)):
        raise CalibrationError(f"--held-out-sources {', '.join(both)}: must be other sources than --sources")
    if args.pool_kernel is not None:
        raise CalibrationError(
            "--pool-kernel is no longer there: the kernel is a part of each ranker, and several are tried. Give "
            f"--rankers claa:kernel={args.pool_kernel}"
        )
    read(args.rankers)
    if args.count < 1:
        raise CalibrationError(f"--count {args.count}: must be 1 or more")
    for name, value in (("--needle-recall", args.needle_recall), ("--whole", args.whole)):
        if not 0 <= value < 1:
            raise CalibrationError(f"{name} {value:g}: must be 0 or more and below 1, which no number of prompts shows")
    for rate in (*args.keep_rates, args.oracle_rate):
        if not 0 < rate <= 1:
            raise CalibrationError(f"keep rate {rate:g}: must be above 0 and at most 1")
