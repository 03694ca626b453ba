"""What the command takes. Imports nothing that takes time: every subcommand builds this parser."""

from __future__ import annotations

import argparse
from pathlib import Path

URL = "http://127.0.0.1:30000"
NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=URL, help="of the server (default: %(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help="as --api-key of the server")
    parser.add_argument("--prompt-file", type=Path, required=True, metavar="FILE", help="the prompt, as UTF-8 text")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="HTML file to write")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=NEW_TOKENS, help="of the answer (default: %(default)s)"
    )
    parser.add_argument("--keep-rate", type=float, metavar="RATE", help="default: the server's")
    parser.add_argument("--ranker", metavar="NAME", help="default: the server's")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one answer (default: %(default)g)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value
