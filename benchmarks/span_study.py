"""Whether a ranking keeps an answer whole: for each ranker and set of scored layers, the keep rates that this takes.

    python -m benchmarks.span_study --model MODEL --lengths 1024 4096 --rankers claa claa:paper --layers 13 9,11

A prompt is studied once: one prefill and the model's own answer give every statistic that a ranker folds. Each ranker,
read as a server reads it, then ranks the prompt's tokens, over each set of layers. The answer is whole if all tokens
that it copies are kept; what dense does not find cannot be lost, so prompts whose answer the model does not give are
left out. That a whole answer is kept does not say that it is given: `benchmarks.eval_quality` asks for that.

Prompts end in two forms: `prefix` with the beginning of the answer already said, `chat` with the template alone.
Studies are kept in `--studies`: run again with other rankers or layers, nothing is studied again. It runs on a GPU
where there is one, in bf16, and else on the CPU in fp32.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from tqdm import tqdm

from benchmarks.quality import recording
from benchmarks.spans import tables
from benchmarks.spans.counting import Group, Layers, Outcome, outcomes, rows
from claa_sglang.offline.basics import WINDOW, CaptureError, RecordError
from claa_sglang.offline.models import load_model
from claa_sglang.offline.samples import sample
from claa_sglang.offline.study import load_or_study
from claa_sglang.ranking.rankers import Ranker, make
from claa_sglang.ranking.spec import HELP, RankerError, parse
from claa_sglang.tasks.generate import TASKS, TaskError, generate
from claa_sglang.tasks.record import Prompt
from claa_sglang.tasks.sources import SOURCES

FORMS = ("prefix", "chat")
RANKERS = ("claa", "claa:last=off", "claa:carry=0", "claa:paper", "last-query")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        rankers = {name: make(parse(name)) for name in args.rankers}
        model, tokenizer = load_model(args.model)
        layer_sets = checked(args.layers, model.config.num_hidden_layers)
        prompts = [(form, prompt) for form in args.forms for prompt in prompts_of(tokenizer, form, args)]
        found = list(counted(model, tokenizer, prompts, rankers, layer_sets, args))
    except (CaptureError, RankerError, RecordError, TaskError) as error:
        print(error, file=sys.stderr)
        return 1
    made = rows(found, args.keep_rates)
    tables.show(made, args.keep_rates)
    asked = Counter(Group(form, prompt.length, prompt.task) for form, prompt in prompts)
    whole = Counter(one.group for one in found)
    record = {
        "command": "python -m benchmarks.span_study " + " ".join(argv),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": Path(args.model).name,
        "versions": {name: version(name) for name in ("claa-sglang", "torch", "transformers")},
        "window": WINDOW,
        "keep_rates": args.keep_rates,
        "prompts": [
            {**group._asdict(), "asked": n, "counted": whole[group] // (len(rankers) * len(layer_sets))}
            for group, n in asked.items()
        ],
        "rows": msgspec.to_builtins(made),
    }
    recording.write(record, args.out)
    return 0


def prompts_of(tokenizer: Any, form: str, args: argparse.Namespace) -> Iterator[Prompt]:
    """Raises TaskError, as `generate` does."""
    wanted = (args.tasks, args.lengths, args.sources, args.count)
    return generate(tokenizer, *wanted, seed=args.seed, prefix=form == "prefix")


def counted(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[str, Prompt]],
    rankers: dict[str, Ranker],
    layer_sets: Sequence[Layers],
    args: argparse.Namespace,
) -> Iterator[Outcome]:
    """Outcomes of each prompt whose answer the model gives; every prompt is (form, prompt).

    Raises CaptureError for a prompt that cannot be studied, RecordError for a damaged study.
    """
    for form, prompt in tqdm(prompts, desc="studies", unit="prompt"):
        taken = sample(prompt, tokenizer)
        made = load_or_study(args.studies, model, taken.input_ids, max_answer_tokens=prompt.max_new_tokens or 1)
        needed = taken.used(tokenizer.decode(made.answer))
        if needed.any():
            yield from outcomes(Group(form, prompt.length, prompt.task), made, needed, rankers, layer_sets)


def checked(layer_sets: Sequence[Layers] | None, layers: int) -> list[Layers]:
    """The sets asked for; by default half depth, alone and with the three before it. Raises CaptureError."""
    half = layers // 2 - 1
    for one in layer_sets or ():
        if one[-1] >= layers:
            raise CaptureError(f"--layers {','.join(map(str, one))}: the model has layers 0 to {layers - 1}")
    return list(layer_sets or dict.fromkeys([(half,), tuple(range(max(0, half - 3), half + 1))]))


def layers_of(text: str) -> Layers:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: give layers as in 13 or 9,11")
    return tuple(sorted({int(part) for part in parts}))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.span_study", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory or name of a Hugging Face causal LM")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="default: both")
    parser.add_argument(
        "--tasks", nargs="+", default=[task for task in TASKS if task != "common-words"], metavar="TASK",
        help=f"of {', '.join(TASKS)}; common-words names no needles (default: all others)",
    )  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096], help="default: %(default)s")
    parser.add_argument(
        "--sources", nargs="+", default=["prose"], metavar="SOURCE",
        help=f"of filler: {', '.join(SOURCES)} or a text file (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=2, help="per task, length and source (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; default: %(default)s")
    parser.add_argument("--rankers", nargs="+", default=list(RANKERS), metavar="RANKER", help=f"of {HELP}")
    parser.add_argument(
        "--layers", nargs="+", type=layers_of, metavar="L[,L…]",
        help="sets of scored layers (default: half depth, alone and with the three before it)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-rates", nargs="+", type=float, default=[0.1, 0.15, 0.2, 0.3], help="default: %(default)s"
    )
    parser.add_argument("--studies", type=Path, default=Path(".cache", "studies"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="JSON of results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
