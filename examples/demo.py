"""One long prompt with a fact hidden in it, answered pruned and dense, then a follow-up over the same text.

Starts a server with the plugin, warms it up, asks, prints a table, stops the server. Exits with 1 when the
pruned run misses a fact that the dense run finds, when nothing was pruned, or when a follow-up did not hit the
prefix cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prose
import torch
from rich.console import Console
from rich.table import Table
from serving import Answer, ask, flush, serve

from claa_sglang.cpu_env import CpuEnvError, cpu_environment

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
PROFILE = ROOT / "claa_sglang" / "profiles" / "smollm2-135m-instruct.json"
CPU_FLAGS = ["--device", "cpu", "--attention-backend", "torch_native", "--max-total-tokens", "20000"]

FACTS = {"lantern": 482913, "harbor": 705264}
WARM_UP_FACTS = {"window": 118306, "basket": 930457}
MAX_NEW_TOKENS = 32
Modes = Mapping[str, Mapping[str, Any] | None]
MODES: Modes = {"pruned": {}, "dense": {"enabled": False}}


@dataclass(frozen=True)
class Run:
    """One question in one mode; the times are of all repeats, the answer is of the last."""

    question: str
    mode: str
    number: int
    answer: Answer
    ttfts: list[float]

    @property
    def right(self) -> bool:
        return str(self.number) in self.answer.text

    @property
    def cached(self) -> int:
        """Prompt tokens taken from the prefix cache."""
        return int(self.answer.claa.get("early_cached_tokens") or self.answer.meta["cached_tokens"])


def main() -> int:
    """Run the demo; returns the exit status."""
    args = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    gpu = torch.cuda.is_available()
    flags = [] if args.stock else ["--enable-claa", "--claa-profile", str(args.profile)]
    try:
        env = {} if gpu else cpu_environment()
        device = "GPU" if gpu else "CPU"
        with (
            console.status(f"starting SGLang on the {device}, about half a minute") as status,
            serve(args.model_path, flags + ([] if gpu else CPU_FLAGS), env) as url,
        ):
            status.update("warming up")
            prompts, modes = _Prompts(args.model_path), {"dense": None} if args.stock else MODES
            _warm_up(url, prompts, modes)
            status.update("asking, pruned and dense")
            runs = _ask_all(url, prompts, modes, args.repeats)
    except (RuntimeError, CpuEnvError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    console.print(_table(runs))
    problems = _problems(runs, stock=args.stock)
    for problem in problems:
        console.print(f"[bold red]{problem}[/]")
    return 1 if problems else 0


def _warm_up(url: str, prompts: _Prompts, modes: Modes) -> None:
    for options in modes.values():
        # Both questions, so that the path of a prefix hit has run too.
        for word in WARM_UP_FACTS:
            ask(url, prompts.about(WARM_UP_FACTS, word), 2, options)


def _ask_all(url: str, prompts: _Prompts, modes: Modes, repeats: int) -> list[Run]:
    runs: dict[tuple[str, str], Run] = {}
    for _ in range(repeats):
        for mode, options in modes.items():
            # Each conversation starts cold; its follow-up finds what its own first question left.
            flush(url)
            for question, (word, number) in zip(("first question", "follow-up"), FACTS.items(), strict=True):
                answer = ask(url, prompts.about(FACTS, word), MAX_NEW_TOKENS, options)
                ttfts = runs[question, mode].ttfts if (question, mode) in runs else []
                runs[question, mode] = Run(question, mode, number, answer, [*ttfts, answer.ttft])
    return sorted(runs.values(), key=lambda run: run.question != "first question")


def _table(runs: list[Run]) -> Table:
    table = Table(title="SmolLM2-135M-Instruct, one long prompt", title_justify="left")
    for column in ("", "answer", "prompt tokens", "kept tokens", "prune layer", "from cache", "TTFT"):
        table.add_column(column, justify="left" if column in ("", "answer") else "right")
    for run in runs:
        claa = run.answer.claa
        mark = "[green]right[/]" if run.right else f"[red]wrong, {run.number}[/]"
        table.add_row(
            f"{run.question}, {run.mode}",
            f"{run.answer.text[:100]!r} ({mark})",
            str(run.answer.meta["prompt_tokens"]),
            str(claa["kept_tokens"]) if claa.get("pruned") else "all",
            str(claa["prune_layer"]) if claa.get("pruned") else "-",
            str(run.cached),
            f"{1000 * statistics.median(run.ttfts):.0f} ms",
        )
    return table


def _problems(runs: list[Run], stock: bool) -> list[str]:
    problems = []
    by_key = {(run.question, run.mode): run for run in runs}
    for run in runs:
        name = f"{run.question}, {run.mode}"
        if run.question == "follow-up" and run.cached < run.answer.meta["prompt_tokens"] // 2:
            problems.append(f"{name}: no prefix hit, {run.cached} tokens came from the cache")
        if run.mode == "pruned" and not run.answer.claa.get("pruned"):
            problems.append(f"{name}: nothing was pruned: {run.answer.claa.get('reason', 'the plugin is silent')}")
        if run.mode == "pruned" and not run.right and by_key[run.question, "dense"].right:
            problems.append(f"{name}: missed {run.number}, which the dense run found")
        if stock and not run.right:
            problems.append(f"{name}: missed {run.number}")
    return problems


class _Prompts:
    """Prompts with the model's chat template applied, so that /generate and the clock see one string."""

    def __init__(self, model_path: Path):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model_path)

    def about(self, facts: Mapping[str, int], word: str) -> str:
        content = f"{prose.document(facts)}\n\n{prose.question(word)}"
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=MODEL, help="as `make model` prepares it")
    parser.add_argument("--profile", type=Path, default=PROFILE, help="the plugin's settings for this model")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats; the median is shown (default: 3)")
    parser.add_argument("--stock", action="store_true", help="without the plugin: dense runs only")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
