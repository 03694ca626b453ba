"""A calibration from its command-line arguments to a confirmed profile: study, search, judge, report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from claa_sglang.config.profile_file import Profile
from claa_sglang.offline.calibrate import profile, report
from claa_sglang.offline.calibrate.command import PROMPT_TOKENS
from claa_sglang.offline.calibrate.criteria import measured
from claa_sglang.offline.calibrate.default import default_choice, rivals
from claa_sglang.offline.calibrate.evidence import Kept
from claa_sglang.offline.calibrate.held_out import Verdict, promising, require_one, verdicts
from claa_sglang.offline.calibrate.price import Price, measured_constants
from claa_sglang.offline.calibrate.schedule import estimated, kept_by, seen
from claa_sglang.offline.calibrate.search import Candidate, one_step, second_steps
from claa_sglang.offline.calibrate.studied import Studied, by_source, group, study_all
from claa_sglang.offline.calibrate.target import CalibrationError, Target
from claa_sglang.policy.cost import Constants
from claa_sglang.ranking.rankers import Claa
from claa_sglang.tasks.generate import generate
from claa_sglang.tasks.record import Prompt, load


def calibrate(args: argparse.Namespace) -> Profile:
    """See `command.add_arguments` for the arguments. Prints what it chose from. Raises CalibrationError."""
    console = Console()
    model, tokenizer = _load(args)
    target = Target(args.target, args.needle_recall, args.oracle_rate)
    prompts, held_out_prompts = _prompts(args, tokenizer)
    pairs = study_all(prompts, model, tokenizer, args.studies, "calibration prompts")
    held_out_pairs = study_all(held_out_prompts, model, tokenizer, args.studies, "held-out prompts")
    ranker = Claa(pool_kernel=args.pool_kernel)
    calibrated = group(pairs, tokenizer, args.oracle_rate, ranker)
    held_out = by_source(held_out_pairs, tokenizer, args.oracle_rate, ranker)
    price = _price(args, model, calibrated)

    one, two = _search(args, calibrated, target, price)
    everything_else = group(held_out_pairs, tokenizer, args.oracle_rate, ranker)

    def on_held_out(candidate: Candidate) -> Kept:
        return kept_by(candidate.steps, everything_else, estimated)

    console.print(report.grid(f"chosen on {calibrated.name}", one, lambda candidate: candidate.kept, target))
    console.print(report.grid(f"the same on held-out {everything_else.name}", one, on_held_out, target))
    default = default_choice(calibrated.evidence, price)
    console.print(report.against_default(default, rivals(default, [*one, *two], target), on_held_out))
    if two:
        console.print(report.steps_at_equal_cost(one, two, on_held_out, target))

    good = promising([*one, *two], target)
    tried = _judge(good, held_out, model, target, console)
    title = f"chosen from (TTFT at {price.tokens:,} tokens, dense = 1)"
    console.print(report.choices(title, report.worth_showing(good, tried, target), tried))
    verdict = require_one(tried, calibrated.name)
    on_calibration = measured(kept_by(verdict.candidate.steps, calibrated, seen(model)))
    return profile.make(model, verdict, calibrated, on_calibration, held_out, target, price)


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # bf16 took five times as long as fp32 on a CPU without instructions for it.
    dtype = args.dtype or ("float32" if device.type == "cpu" else "auto")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(args.model)


def _prompts(args: argparse.Namespace, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    if args.prompts is not None:
        prompts, held_out = load(args.prompts), load(args.held_out)
        if both := {p.source for p in prompts} & {p.source for p in held_out}:
            raise CalibrationError(
                f"source {', '.join(sorted(both))} in both files: held-out prompts must be of other sources of text; "
                "name the `source` of each prompt"
            )
        return prompts, held_out
    what = (args.tasks, [args.length])
    return (
        list(generate(tokenizer, *what, args.sources, args.count, args.seed)),
        list(generate(tokenizer, *what, args.held_out_sources, args.count, args.seed)),
    )


def _price(args: argparse.Namespace, model: Any, calibrated: Studied) -> Price:
    config = model.config.get_text_config()
    tokens = args.prompt_tokens or min(PROMPT_TOKENS, config.max_position_embeddings)
    constants = Constants(*args.cost_constants) if args.cost_constants else measured_constants(model)
    return Price(constants, config.num_hidden_layers, tokens, calibrated.evidence.window)


def _search(
    args: argparse.Namespace, calibrated: Studied, target: Target, price: Price
) -> tuple[list[Candidate], list[Candidate]]:
    """All choices of one step, and of two if asked for."""
    layers = price.layers
    first, last = args.prune_layers or (layers // 4, layers - 2)
    if not 0 <= first <= last <= layers - 2:
        raise CalibrationError(f"--prune-layers {first} {last}: give two of 0 to {layers - 2}, the lower one first")
    rates, prune_layers = sorted(set(args.keep_rates)), range(first, last + 1)
    found = one_step(calibrated.evidence, target, rates, prune_layers, price)
    one = list(tqdm(found, total=len(rates) * len(prune_layers), unit="choice", desc="one step"))
    two: list[Candidate] = []
    if args.steps > 1:
        for candidate in tqdm(one, unit="first step", desc="two steps"):
            two += second_steps(candidate, calibrated, target, rates, prune_layers, price)
    return one, two


def _judge(
    front: Sequence[Candidate], held_out: Sequence[Studied], model: Any, target: Target, console: Console
) -> list[Verdict]:
    """Verdicts of the held-out text, said as they come."""

    def judge(candidate: Candidate) -> dict[str, Kept]:
        return {one.name: kept_by(candidate.steps, one, seen(model)) for one in held_out}

    tried = []
    for verdict in verdicts(front, judge, target):
        report.say(console, verdict)
        tried.append(verdict)
    return tried
