"""`claa-sglang tasks`: write prompts with known answers to a JSONL file."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
from tqdm import tqdm

from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.generate import TASKS, generate, total
from claa_sglang.tasks.record import save
from claa_sglang.tasks.sources import SOURCES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="directory or name of the model whose tokenizer counts")
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096], help="in tokens")
    parser.add_argument(
        "--sources",
        nargs="+",
        default=["prose", "repeated"],
        metavar="SOURCE",
        help=f"of filler: {', '.join(SOURCES)} or a text file (default: %(default)s)",
    )
    parser.add_argument("--count", type=int, default=64, help="per task, length and source (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; default: %(default)s")
    parser.add_argument(
        "--no-prefix", action="store_true", help="leave out the beginning of the answer: end as a chat does"
    )
    parser.add_argument("--token-ids", action="store_true", help="write token ids, for a machine without the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="file to write; .xz and .gz are compressed")


def run(args: argparse.Namespace) -> int:
    """Raises TaskError with the reason if the prompts cannot be made, OSError if the file cannot be written."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    wanted = (args.tasks, args.lengths, args.sources, args.count)
    prompts = tqdm(
        generate(tokenizer, *wanted, args.seed, not args.no_prefix), total=total(*wanted), unit="prompt", desc="tasks"
    )
    if args.token_ids:
        ids = (msgspec.structs.replace(p, messages=None, input_ids=token_ids(p, tokenizer)) for p in prompts)
        count = save(ids, args.out)
    else:
        count = save(prompts, args.out)
    print(f"{args.out}: {count} prompts")
    return 0
