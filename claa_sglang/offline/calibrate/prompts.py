"""The prompts of a calibration, generated in several forms and lengths or read from files; whether they suffice."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from claa_sglang.offline.calibrate.criteria import CONFIDENCE, least_prompts
from claa_sglang.offline.calibrate.held_out import HELD_OUT_CONFIDENCE
from claa_sglang.offline.calibrate.studied import Studied
from claa_sglang.offline.calibrate.target import LONG_ANSWER, LONG_TASKS, CalibrationError, Target
from claa_sglang.tasks.generate import generate
from claa_sglang.tasks.record import Prompt, load

LENGTHS = (1024, 4096)  # tokens: a rate that holds at one need not hold at the other


def prompts(args: argparse.Namespace, tokenizer: Any, longest: int) -> tuple[list[Prompt], list[Prompt]]:
    """To choose on, and held out. longest: tokens of the longest prompt that the model takes.

    Raises CalibrationError where both have text of one source, TaskError or PromptError for prompts that cannot be
    made or read.
    """
    if args.prompts is not None:
        chosen_on, held_out = load(args.prompts), load(args.held_out)
        if both := {p.source for p in chosen_on} & {p.source for p in held_out}:
            raise CalibrationError(
                f"source {', '.join(sorted(both))} in both files: held-out prompts must be of other sources of text; "
                "name the `source` of each prompt"
            )
        return chosen_on, held_out
    lengths = lengths_for(args.lengths, longest)
    return (
        _generated(args, tokenizer, lengths, args.sources),
        _generated(args, tokenizer, lengths, args.held_out_sources),
    )


def lengths_for(asked: Sequence[int] | None, longest: int) -> list[int]:
    """The lengths asked for, each once; by default LENGTHS, cut to what the model takes. Raises CalibrationError."""
    if asked is None:
        return sorted({min(length, longest) for length in LENGTHS})
    if max(asked) > longest:
        raise CalibrationError(f"--lengths {max(asked)}: this model takes at most {longest}, with an answer")
    return sorted(set(asked))


def _generated(
    args: argparse.Namespace, tokenizer: Any, lengths: Sequence[int], sources: Sequence[str]
) -> list[Prompt]:
    """Prompts in the forms asked for. Of both, the half that ends as a chat does is the larger one of an odd count."""
    begun = {"both": args.count // 2, "prefix": args.count, "chat": 0}[args.form]
    found: list[Prompt] = []
    for prefix, count, seed in ((True, begun, args.seed), (False, args.count - begun, args.seed + begun)):
        found += generate(tokenizer, args.tasks, lengths, sources, count, seed, prefix)
    return found


def require_enough(calibrated: Studied, held_out: Sequence[Studied], target: Target) -> None:
    """Raise CalibrationError where no choice could reach the bound of whole answers, as too few answers are known."""
    for what, sets, confidence in (
        ("calibration", [calibrated], CONFIDENCE),
        ("held-out", held_out, HELD_OUT_CONFIDENCE),
    ):
        known = sum(int((one.evidence.total_needed > 0).sum()) for one in sets)
        total = sum(len(one.samples) for one in sets)
        least = least_prompts(target.whole, confidence)
        if 0 < known < least:
            raise CalibrationError(
                f"the model gave the expected answer to {known} of {total} {what} prompts; to say that at least "
                f"{target.whole:g} of all answers are kept whole takes {least}, even if every one is. Give more "
                "prompts (--count), or ask for less (--whole)"
            )


def warning(sets: Sequence[Studied]) -> str:
    """What to say if no prompt has a long answer; empty if one has."""
    if any(longest >= LONG_ANSWER for one in sets for longest in one.longest):
        return ""
    return (
        f"no prompt has an answer of {LONG_ANSWER} tokens or more in one place that the model gave: whether long ones, "
        f"such as code, quotations and links, are kept whole is not measured. Tasks that have one: "
        f"{', '.join(LONG_TASKS)}"
    )
