"""One long prompt with a number hidden in it, answered pruned and dense, then a follow-up over the same text.

Starts a server with the plugin, warms it up, asks, prints a table, stops the server. Exits with 1 when the
pruned run misses what the dense run finds, when nothing was pruned, or when a follow-up did not hit the prefix
cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import prose
import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table
from serving import Answer, ask, flush, serve

from claa_sglang.tools.cpu_env import CpuEnvError, cpu_environment

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
PROFILE = ROOT / "claa_sglang" / "profiles" / "smollm2-135m-instruct.json"
# Many CPUs have no bf16 arithmetic and emulate it, several times slower than fp32.
CPU_FLAGS = ["--device", "cpu", "--attention-backend", "torch_native", "--max-total-tokens", "20000"]
CPU_FLAGS += ["--dtype", "float32"]
MAX_NEW_TOKENS = 24

Modes = Mapping[str, Mapping[str, Any] | None]
MODES: Modes = {"pruned": {}, "dense": {"enabled": False}}


class Question(NamedTuple):
    """What is asked about the text, and a string that a right answer contains."""

    name: str
    text: str
    expected: str


LANTERN = 482913
FIRST = Question("first question", prose.question("lantern"), str(LANTERN))
FOLLOW_UP = Question("follow-up", *prose.FOLLOW_UP)


@dataclass(frozen=True)
class Run:
    """One question in one mode: the last answer, and the seconds to the first token of every repeat."""

    question: Question
    mode: str
    answer: Answer
    ttfts: list[float]

    @property
    def name(self) -> str:
        return f"{self.question.name}, {self.mode}"

    @property
    def right(self) -> bool:
        return self.question.expected in self.answer.text

    @property
    def cached(self) -> int:
        """Prompt tokens taken from the prefix cache."""
        return int(self.answer.claa.get("early_cached_tokens", self.answer.meta["cached_tokens"]))


class Prompts:
    """Prompts with the model's chat template applied, so that the clock sees the server only."""

    def __init__(self, model_path: Path):
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model_path)

    def about(self, document: str, question: str) -> str:
        chat = [{"role": "user", "content": f"{document}\n\n{question}"}]
        return self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def main() -> int:
    """Run the demo; returns the exit status."""
    args = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    gpu = torch.cuda.is_available()
    flags = [] if args.stock else ["--enable-claa", "--claa-policy", "always", "--claa-profile", str(args.profile)]
    modes: Modes = {"dense": None} if args.stock else MODES
    try:
        env = {} if gpu else cpu_environment()
        with (
            console.status(f"starting SGLang on the {'GPU' if gpu else 'CPU'}, half a minute or so") as status,
            serve(args.model_path, flags + ([] if gpu else CPU_FLAGS), env) as url,
        ):
            prompts = Prompts(args.model_path)
            _say(console, status, "warming up")
            _warm_up(url, prompts, modes)
            _say(console, status, "asking " + " and ".join(modes))
            runs = _ask_all(url, prompts, modes, args.repeats)
    except (RuntimeError, CpuEnvError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    console.print(_table(runs))
    problems = _problems(runs)
    for problem in problems:
        console.print(f"[bold red]{problem}[/]")
    return 1 if problems else 0


def _say(console: Console, status: Status, text: str) -> None:
    """What happens now; as a line of its own where there is no terminal to show a status."""
    status.update(text)
    if not console.is_terminal:
        console.print(text)


def _warm_up(url: str, prompts: Prompts, modes: Modes) -> None:
    document = prose.document("basket", 930457)
    for options in modes.values():
        # Both questions, so that the path of a prefix hit has run before the clock does.
        for question in (prose.question("basket"), FOLLOW_UP.text):
            ask(url, prompts.about(document, question), 2, options)


def _ask_all(url: str, prompts: Prompts, modes: Modes, repeats: int) -> list[Run]:
    document = prose.document("lantern", LANTERN)
    answers: dict[tuple[Question, str], list[Answer]] = {(q, m): [] for q in (FIRST, FOLLOW_UP) for m in modes}
    for _ in range(repeats):
        for mode, options in modes.items():
            # Each starts cold; the follow-up finds what the first question of the same mode left.
            flush(url)
            for question in (FIRST, FOLLOW_UP):
                text = prompts.about(document, question.text)
                answers[question, mode].append(ask(url, text, MAX_NEW_TOKENS, options))
    return [Run(question, mode, got[-1], [a.ttft for a in got]) for (question, mode), got in answers.items()]


def _table(runs: list[Run]) -> Table:
    table = Table(title="SmolLM2-135M-Instruct, one long prompt", title_justify="left", show_lines=True)
    for column in ("", "answer"):
        table.add_column(column)
    for column in ("prompt\ntokens", "kept\ntokens", "prune\nlayer", "from\ncache", "TTFT"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        claa = run.answer.claa
        pruned = claa.get("pruned")
        # The first line: how a small model goes on after its answer is no news.
        said = next(iter(run.answer.text.splitlines()), "")
        mark = "[green]right[/]" if run.right else f"[red]wrong, it is {run.question.expected}[/]"
        table.add_row(
            run.name,
            f"{said} ({mark})",
            str(run.answer.meta["prompt_tokens"]),
            str(claa["kept_tokens"]) if pruned else "all",
            str(claa["prune_layer"]) if pruned else "-",
            str(run.cached),
            f"{1000 * statistics.median(run.ttfts):.0f} ms",
        )
    return table


def _problems(runs: list[Run]) -> list[str]:
    dense = {run.question: run for run in runs if run.mode == "dense"}
    problems = []
    for run in runs:
        if run.question is FOLLOW_UP and run.cached < run.answer.meta["prompt_tokens"] // 2:
            problems.append(f"{run.name}: no prefix hit, {run.cached} tokens came from the cache")
        if run.mode != "pruned":
            continue
        if not run.answer.claa.get("pruned"):
            problems.append(f"{run.name}: nothing was pruned: {run.answer.claa.get('reason', 'no report')}")
        if dense[run.question].right and not run.right:
            problems.append(f"{run.name}: missed {run.question.expected}, which the dense run found")
    if not dense[FIRST].right:
        problems.append(f"{FIRST.name}, dense: missed {FIRST.expected}, so this demo shows nothing")
    return problems


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=MODEL, help="as `make model` prepares it")
    parser.add_argument("--profile", type=Path, default=PROFILE, help="the plugin's settings for this model")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats; the median is shown (default: 3)")
    parser.add_argument("--stock", action="store_true", help="without the plugin: dense runs only")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
