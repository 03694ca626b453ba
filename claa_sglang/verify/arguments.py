"""What the command takes. Imports nothing that takes time: every subcommand builds this parser."""

from __future__ import annotations

import argparse
from pathlib import Path

from claa_sglang.verify import plan

URL = "http://127.0.0.1:30000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=URL, help="of the server (default: %(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help="as --api-key of the server")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="for prompts of claa-sglang tasks; default: the server's, if it is on this machine, else texts",
    )
    parser.add_argument(
        "--tokens",
        type=_positive,
        help=f"of a prompt (default: {plan.LEAST_TOKENS}, or more where the server prunes longer ones only)",
    )
    parser.add_argument(
        "--ttft-tokens",
        type=_positive,
        help=f"of a prompt that is timed (default: up to {max(plan.TTFT_TOKENS)}, by the size of the KV pool)",
    )
    parser.add_argument("--prompts", type=_positive, default=3, help="to compare answers of (default: %(default)s)")
    parser.add_argument("--needles", type=_whole, default=5, help="to find (default: %(default)s)")
    parser.add_argument(
        "--pairs", type=_pairs, default=9, help=f"of times, at least {plan.LEAST_PAIRS} (default: %(default)s)"
    )
    parser.add_argument(
        "--ttft-at-most",
        type=float,
        default=1.0,
        metavar="RATIO",
        help="what is claimed of pruned TTFT over dense's (default: %(default)g)",
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one answer (default: %(default)g)")
    parser.add_argument("--out", type=Path, help="JSON file for the record")


def _whole(text: str) -> int:
    return _at_least(text, 0)


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _pairs(text: str) -> int:
    return _at_least(text, plan.LEAST_PAIRS)


def _at_least(text: str, least: int) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
    return value
