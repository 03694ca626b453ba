"""What pruning gains on a cold long prompt, what it costs on a follow-up over the same text, and the answers.

Starts a server with the plugin, warms it up, asks the same questions dense and pruned, prints times and answers, stops
the server. Exits with 1 when the pruned run misses what the dense run finds, when nothing was pruned, or when a
follow-up did not hit the prefix cache. Times decide nothing: a busy machine makes any of them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import prose
import torch
import verdict
from asking import Answer, ask
from progress import Progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from verdict import Times

from claa_sglang.tools.cpu_env import CpuEnvError, cpu_environment
from claa_sglang.tools.servers import Server, server

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
# Many CPUs have no bf16 arithmetic and emulate it, several times slower than fp32.
CPU_FLAGS = ["--device", "cpu", "--attention-backend", "torch_native", "--max-total-tokens", "20000"]
CPU_FLAGS += ["--dtype", "float32"]
MAX_NEW_TOKENS = 24
START_TIMEOUT = 600.0  # seconds
INTRO = (
    "The same questions about one text, [bold]dense[/]: every token goes through every layer, as without the plugin; "
    "and [bold]pruned[/]: only the tokens that matter go through the late layers.\n"
)
AUTO = (
    "This demo prunes always, to show both. A server's default, [bold]--claa-policy auto[/], prunes a prompt only "
    "where it expects that to be faster, and makes what that left dense while nobody asks: follow-ups cost little then."
)

Modes = Mapping[str, Mapping[str, Any] | None]
MODES: Modes = {"dense": {"enabled": False}, "pruned": {}}


class Question(NamedTuple):
    """What is asked about the text, and a string that a right answer contains."""

    name: str
    text: str
    expected: str


LANTERN = 482913
FIRST = Question("cold prompt", prose.question("lantern"), str(LANTERN))
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
    def ms(self) -> float:
        """Median milliseconds to the first token."""
        return 1000 * statistics.median(self.ttfts)

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
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=not sys.stdout.isatty())
    if not args.stock:
        console.print(INTRO, highlight=False)
    progress = Progress(console)
    gpu = torch.cuda.is_available()
    # Without finishing, as the follow-up is to find what the first question left, however long that is ago.
    claa = ["--enable-claa", "--claa-policy", "always", "--claa-finish", "off", "--claa-profile", args.profile]
    flags = [] if args.stock else claa
    modes: Modes = {"dense": None} if args.stock else MODES
    try:
        env = {} if gpu else cpu_environment()
        with contextlib.ExitStack() as stack:
            with progress.step(f"starting SGLang with {args.model_path.name} on the {'GPU' if gpu else 'CPU'}"):
                starting = server(args.model_path, *flags, *([] if gpu else CPU_FLAGS), env=env, timeout=START_TIMEOUT)
                running = stack.enter_context(starting)
            prompts = Prompts(args.model_path)
            with progress.step("warming up with another text"):
                _warm_up(running, prompts, modes)
            runs = _ask_all(running, prompts, modes, args.repeats, progress)
    except (RuntimeError, CpuEnvError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; its server is stopped", file=sys.stderr)
        return 130
    _show(console, runs, args.repeats)
    problems = _problems(runs)
    for problem in problems:
        console.print(f"[bold red]{problem}[/]")
    return 1 if problems else 0


def _warm_up(running: Server, prompts: Prompts, modes: Modes) -> None:
    document = prose.document("basket", 930457)
    for options in modes.values():
        # Both questions, so that the path of a prefix hit has run before the clock does.
        for question in (prose.question("basket"), FOLLOW_UP.text):
            ask(running.url, prompts.about(document, question), 2, options)


def _ask_all(running: Server, prompts: Prompts, modes: Modes, repeats: int, progress: Progress) -> list[Run]:
    document = prose.document("lantern", LANTERN)
    answers: dict[tuple[Question, str], list[Answer]] = {(q, m): [] for q in (FIRST, FOLLOW_UP) for m in modes}
    for repeat in range(1, repeats + 1):
        for mode, options in modes.items():
            # Each starts cold; the follow-up finds what the first question of the same mode left.
            running.flush()
            for question in (FIRST, FOLLOW_UP):
                text = prompts.about(document, question.text)
                name = f"round {repeat} of {repeats}, {mode:6} {question.name}"
                with progress.step(name, announce=False):
                    answer = ask(running.url, text, MAX_NEW_TOKENS, options)
                answers[question, mode].append(answer)
                progress.line(f"{name}: first token after {1000 * answer.ttft:,.0f} ms")
    return [Run(question, mode, got[-1], [a.ttft for a in got]) for (question, mode), got in answers.items()]


def _show(console: Console, runs: list[Run], repeats: int) -> None:
    """Times as a table, answers, and what both mean."""
    by = {(run.question, run.mode): run for run in runs}
    pruned = (FIRST, "pruned") in by
    console.print()
    console.print(_table(by, f"Time to the first token, median of {repeats}"))
    for question in (FIRST, FOLLOW_UP):
        console.print(f"\n[bold]{question.name}[/]: {question.text}", highlight=False)
        for run in (run for run in runs if run.question is question):
            # The first line: how a small model goes on after its answer is no news.
            said = next(iter(run.answer.text.splitlines()), "")
            mark = "[green]right[/]" if run.right else f"[red]wrong, it is {question.expected}[/]"
            console.print(f"  {run.mode:6}  {mark}: {escape(said)}", highlight=False)
    # A run that pruned nothing has no gain to speak of; it is a problem, named at the end.
    if not pruned or not all(by[question, "pruned"].answer.claa.get("pruned") for question in (FIRST, FOLLOW_UP)):
        return
    cold, follow_up = (Times(by[q, "dense"].ms, by[q, "pruned"].ms) for q in (FIRST, FOLLOW_UP))
    claa, second = by[FIRST, "pruned"].answer.claa, by[FOLLOW_UP, "pruned"]
    lines = {
        "Gain, on the cold prompt": verdict.gain(cold, claa["prompt_tokens"], claa["kept_tokens"], claa["prune_layer"]),
        "Cost, on the follow-up": verdict.cost(follow_up, second.cached, second.answer.meta["prompt_tokens"]),
        "Together": verdict.sentence(cold, follow_up),
    }
    console.print()
    for name, text in lines.items():
        console.print(f"[bold]{name}[/]: {text}", highlight=False)
    console.print(AUTO, highlight=False)


def _table(by: Mapping[tuple[Question, str], Run], title: str) -> Table:
    """One row for each question: its prompt, and the time of each mode."""
    modes = list(dict.fromkeys(mode for _, mode in by))
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("prompt\ntokens", "from\ncache", *modes, *(["pruned /\ndense"] if "pruned" in modes else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for question in (FIRST, FOLLOW_UP):
        runs = [by[question, mode] for mode in modes]
        times = [f"{run.ms:,.0f} ms" for run in runs]
        if "pruned" in modes:
            times.append(f"{by[question, 'pruned'].ms / by[question, 'dense'].ms:.2f}")
        cached = " / ".join(dict.fromkeys(f"{run.cached:,}" for run in runs))
        table.add_row(question.name, f"{runs[0].answer.meta['prompt_tokens']:,}", cached, *times)
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
    parser.add_argument("--profile", default="auto", help="as --claa-profile (default: the one for this model)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats; the median is shown (default: 3)")
    parser.add_argument("--stock", action="store_true", help="without the plugin: dense runs only")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
