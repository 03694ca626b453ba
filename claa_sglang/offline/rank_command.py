"""`claa-sglang rank-report`: hold rankers against the Answer-Informed Oracle, layer by layer."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from claa_sglang.offline.basics import MAX_ANSWER_TOKENS, WINDOW, CaptureError
from claa_sglang.ranking.spec import HELP, PAPER, SWITCHES, parse
from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.record import Prompt, load

# The paper's rule beside ours.
DEFAULT = [named for name in SWITCHES for named in ([name, f"{name}:{PAPER}"] if name == "claa" else [name])]

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from torch import Tensor

    from claa_sglang.offline.study import PromptStudy


def run(args: argparse.Namespace) -> int:
    """Study what is not studied yet, then print tables and write rank-report.json, rank-report.png and oracle.jsonl.

    Raises CaptureError, RecordError, RankerError or PromptError with the reason, OSError if files cannot be used.
    """
    try:  # all that can be refused is refused before any long work
        import matplotlib  # noqa: F401
        from rich.console import Console
        from tqdm import tqdm
    except ImportError as error:
        raise CaptureError(f"{error}; pip install 'claa-sglang[tools]'") from error

    from claa_sglang.offline import rank_plot, rank_report, rank_table
    from claa_sglang.offline.models import load_model, study_prompts

    for name in args.rankers:
        parse(name)
    prompts = load(args.prompts)[: args.limit]
    model, tokenizer = load_model(args.model)
    draft = None if args.draft is None else _load_draft(args.draft, tokenizer)
    choices = {"window": args.window, "max_answer_tokens": args.max_answer_tokens}
    studies = list(study_prompts(model, tokenizer, prompts, args.studies, **choices))
    given: list[dict[str, Tensor]] = [{} for _ in prompts]
    if draft is not None:
        given = _look_ahead(draft, tokenizer, prompts, args.studies)
    needed = [_needed(prompt, study, tokenizer) for prompt, study in zip(prompts, studies, strict=True)]
    rows = zip(studies, prompts, given, needed, strict=True)
    report = rank_report.build(
        [rank_report.Studied(made, prompt.source, elsewhere, repeated) for made, prompt, elsewhere, repeated in rows],
        args.rankers,
        keep_rate=args.keep_rate,
        scored=args.score_layers,
        progress=lambda items: tqdm(items, desc="rankings", unit="prompt"),
    )
    versions = {name: importlib.metadata.version(name) for name in ("claa-sglang", "torch", "transformers")}
    report = msgspec.structs.replace(report, versions=versions)

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rank-report.json").write_bytes(msgspec.json.encode(report) + b"\n")
    rank_plot.plot(report, args.out / "rank-report.png")
    _write_rankings(args.out, prompts, studies, given)
    console = Console()
    console.print(rank_table.heading(report))
    for table in rank_table.tables(report):
        console.print(table)
    console.print(f"{args.out}/rank-report.json, {args.out}/rank-report.png", soft_wrap=True)
    return 0


def _needed(prompt: Prompt, study: PromptStudy, tokenizer: Any) -> Tensor | None:
    """Tokens of the prompt that the model's own right answer repeats, bool [N]; None where that is not known."""
    from claa_sglang.offline.samples import sample

    if not prompt.needles:
        return None
    return sample(prompt, tokenizer).used(tokenizer.decode(study.answer))


def _write_rankings(
    directory: Path, prompts: Sequence[Prompt], studies: Sequence[PromptStudy], given: Sequence[dict[str, Tensor]]
) -> None:
    """The rankings that no server can make, oracle.jsonl and specprefill.jsonl, for `eval_quality --given`."""
    from claa_sglang.tasks.rankings import Ranking, write

    made = [{"oracle": study.oracle, **elsewhere} for study, elsewhere in zip(studies, given, strict=True)]
    for name in made[0]:
        orders = [rankings[name].argsort(descending=True, stable=True).tolist() for rankings in made]
        lines = [Ranking(prompt.key, order) for prompt, order in zip(prompts, orders, strict=True)]
        write(directory / f"{name}.jsonl", lines)


def _load_draft(path: str, tokenizer: Any) -> Any:
    """The draft model at `path`, if its tokenizer is the target's."""
    from claa_sglang.offline.models import load_model
    from claa_sglang.offline.spec_prefill import require_same_tokenizer

    draft, draft_tokenizer = load_model(path)
    require_same_tokenizer(draft_tokenizer, tokenizer)
    return draft


def _look_ahead(draft: Any, tokenizer: Any, prompts: Sequence[Prompt], directory: Path) -> list[dict[str, Tensor]]:
    """SpecPrefill's ranking of every prompt."""
    import torch
    from tqdm import tqdm

    from claa_sglang.offline import spec_prefill

    rankings = []
    for prompt in tqdm(prompts, desc="draft", unit="prompt"):
        ids = torch.tensor(token_ids(prompt, tokenizer), dtype=torch.int64)
        rankings.append({"specprefill": spec_prefill.load_or_importance(directory, draft, ids)})
    return rankings


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


def _share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="directory or name of a Hugging Face causal LM")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of prompts, as claa-sglang tasks writes it")
    parser.add_argument("--limit", type=_count, help="use the first so many prompts (default: all)")
    parser.add_argument("--rankers", nargs="+", default=DEFAULT, metavar="RANKER", help=f"of {HELP}")
    parser.add_argument("--draft", help="smaller model with the same tokenizer: adds SpecPrefill's ranking by it")
    parser.add_argument("--keep-rate", type=_share, default=0.2, help="budget, as a share (default: %(default)s)")
    parser.add_argument("--score-layers", type=_count, default=4, help="last layers CLAA reads (default: %(default)s)")
    parser.add_argument("--window", type=_count, default=WINDOW, help="in tokens (default: %(default)s)")
    parser.add_argument(
        "--max-answer-tokens",
        type=_count,
        default=MAX_ANSWER_TOKENS,
        help="where the oracle's answer is cut (default: %(default)s)",
    )
    parser.add_argument(
        "--studies",
        type=Path,
        default=Path(".cache", "studies"),
        help="directory of finished studies, by model and prompt: run again, and they are used (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for rank-report.json, rank-report.png and oracle.jsonl"
    )
