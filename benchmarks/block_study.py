"""What answers lose where early layers read a few earlier keys for each block of queries: offline, with transformers.

    python -m benchmarks.block_study PROMPTS.jsonl.xz --model MODEL --variants 2048 4096 4096:how=sum --out FILE

Prompts are those of `claa-sglang tasks`. Each is answered greedily, dense and by each variant (`blocks/variant.py`). A
variant reads the dense answer in one forward; where it would give it too, nothing is decoded. *dense, again* does the
same with no key left out, so what it differs by is rounding.

Only early layers read so, 0 to the prune layer; nothing is pruned. What is known is kept beside `--out`, in
`.answers.jsonl`: run again, it goes on. It runs on a GPU where there is one, in bf16, and else on the CPU in fp32.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.blocks.answering import Answer, answer
from benchmarks.blocks.counting import AGAIN, ALL, DENSE, Outcome, Row, rows
from benchmarks.blocks.variant import HELP, Variant, VariantError, parse
from benchmarks.quality import recording
from claa_sglang.offline.basics import CaptureError
from claa_sglang.offline.models import load_model
from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.grade import grade
from claa_sglang.tasks.record import Prompt, PromptError, load

MOST = 64  # tokens of an answer, of a prompt that does not say


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        variants = [parse(name) for name in args.variants]
        prompts = [prompt for path in args.prompts for prompt in load(path)]
        model, tokenizer = load_model(args.model)
    except (CaptureError, PromptError, VariantError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    layers = model.config.num_hidden_layers
    early = layers // 2 if args.prune_layer is None else args.prune_layer + 1
    known = args.out.with_suffix(".answers.jsonl")
    found = list(measured(model, tokenizer, prompts, variants, early, known, args.seconds))
    made = rows(found)
    show(made)
    record = {
        "command": "python -m benchmarks.block_study " + " ".join(argv),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": Path(args.model).name,
        "versions": {name: version(name) for name in ("claa-sglang", "torch", "transformers")},
        "early layers": early,
        "layers": layers,
        "rows": msgspec.to_builtins(made),
    }
    recording.write(record, args.out)
    return 0


def measured(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    variants: Sequence[Variant],
    early: int,
    known: Path,
    seconds: float | None,
) -> Iterator[Outcome]:
    """Every prompt by every variant: from the file `known`, or made now and added to it. Begins no prompt after
    `seconds`."""
    began, before = time.monotonic(), _read(known)
    known.parent.mkdir(parents=True, exist_ok=True)
    ways: list[tuple[str, Variant | None]] = [(AGAIN, None), *((one.name, one) for one in variants)]
    with known.open("ab") as file:
        for prompt in tqdm(prompts, desc="prompts", unit="prompt"):
            have = before.get(prompt.key, {})
            yield from have.values()
            missing = [way for way in ways if way[0] not in have]
            if not missing or (seconds is not None and time.monotonic() - began > seconds):
                continue
            ids, most = token_ids(prompt, tokenizer), prompt.max_new_tokens or MOST
            dense = answer(model, ids, most, early)
            made = [] if DENSE in have else [_outcome(prompt, tokenizer, DENSE, dense, dense)]
            for name, variant in missing:
                by = answer(model, ids, most, early, variant, dense.tokens)
                made.append(_outcome(prompt, tokenizer, name, by, dense))
            for one in made:
                file.write(msgspec.json.encode(one) + b"\n")
            file.flush()
            yield from made


def _outcome(prompt: Prompt, tokenizer: Any, name: str, by: Answer, dense: Answer) -> Outcome:
    return Outcome(
        key=prompt.key,
        task=prompt.task,
        length=prompt.length,
        variant=name,
        right=grade(tokenizer.decode(by.tokens), prompt.answers, prompt.exact),
        same=by.tokens == dense.tokens,
        logprob=by.logprob,
        share=by.share,
    )


def _read(known: Path) -> dict[str, dict[str, Outcome]]:
    """What was answered before, by prompt and variant. A last line that was cut off is left out."""
    found: dict[str, dict[str, Outcome]] = {}
    for line in known.read_bytes().split(b"\n")[:-1] if known.exists() else ():
        one = msgspec.json.decode(line, type=Outcome)
        found.setdefault(one.key, {})[one.variant] = one
    return found


def show(made: Sequence[Row]) -> None:
    """A table for each length."""
    console = Console()
    for length in dict.fromkeys(row.length for row in made):
        names = ("variant", "n", "right %", "less dense", "same %", "log p", "weight read")
        table = Table(*names, title=f"{length} tokens")
        for row in made:
            if row.length == length and row.task == ALL:
                mean, low, high = (100 * value for value in row.difference)
                logprob, read = ("" if value is None else f"{value:.3f}" for value in (row.logprob, row.share))
                table.add_row(
                    row.variant, str(row.n), f"{100 * row.right:.1f}", f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
                    f"{100 * row.same:.0f}", logprob, read,
                )  # fmt: skip
        console.print(table)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block_study", description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, nargs="+", help="JSONL of `claa-sglang tasks`; may be .xz or .gz")
    parser.add_argument("--model", required=True, help="directory or name of a Hugging Face causal LM")
    parser.add_argument("--variants", nargs="+", default=["2048", "4096"], metavar="VARIANT", help=f"each {HELP}")
    parser.add_argument("--prune-layer", type=int, help="the last early layer (default: half depth)")
    parser.add_argument("--seconds", type=float, help="begin no prompt after this time; count what there is")
    parser.add_argument("--out", type=Path, required=True, help="JSON of results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
