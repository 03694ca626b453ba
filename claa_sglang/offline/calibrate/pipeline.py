"""A calibration from its command-line arguments to a confirmed profile: study, choose, write down."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

from claa_sglang.config.profile_file import Profile
from claa_sglang.offline.calibrate import profile
from claa_sglang.offline.calibrate.candidate_layers import candidate_layers, room_in_16_bits
from claa_sglang.offline.calibrate.choose import Question, choose
from claa_sglang.offline.calibrate.criteria import measured
from claa_sglang.offline.calibrate.default import default_ranker
from claa_sglang.offline.calibrate.price import Price, measured_constants
from claa_sglang.offline.calibrate.prompts import prompts, require_enough, warning
from claa_sglang.offline.calibrate.ranker_list import read
from claa_sglang.offline.calibrate.schedule import kept_by, seen
from claa_sglang.offline.calibrate.studied import MOST_ANSWER_TOKENS, Shape, by_source, group, study_all
from claa_sglang.offline.calibrate.target import PROMPT_TOKENS, Target
from claa_sglang.policy.cost import Constants


def calibrate(args: argparse.Namespace) -> Profile:
    """See `command.add_arguments` for the arguments. Prints what it chose from. Raises CalibrationError."""
    console = Console()
    model, tokenizer = _load(args)
    config = model.config.get_text_config()
    prune_layers = candidate_layers(args.prune_layers, room_in_16_bits(config))
    target, rankers = Target(args.target, args.needle_recall, args.whole, args.oracle_rate), read(args.rankers)
    to_choose_on, to_confirm = prompts(args, tokenizer, config.max_position_embeddings - MOST_ANSWER_TOKENS)
    pairs = study_all(to_choose_on, model, tokenizer, args.studies, "calibration prompts")
    held_out_pairs = study_all(to_confirm, model, tokenizer, args.studies, "held-out prompts")
    # The default's ranker too: what was chosen is held against it.
    shape = Shape(args.oracle_rate, (*rankers, default_ranker(config.num_hidden_layers)), model.device)
    calibrated, held_out = group(pairs, tokenizer, shape), by_source(held_out_pairs, tokenizer, shape)
    if said := warning([calibrated, *held_out]):
        console.print(f"[bold yellow]warning[/bold yellow] {said}")
    require_enough(calibrated, held_out, target)

    tokens = args.prompt_tokens or min(PROMPT_TOKENS, config.max_position_embeddings)
    constants = Constants(*args.cost_constants) if args.cost_constants else measured_constants(model)
    price = Price(constants, config.num_hidden_layers, tokens, calibrated.evidence.window)
    question = Question(target, rankers, tuple(sorted(set(args.keep_rates))), prune_layers, price, args.steps)
    verdict = choose(question, calibrated, held_out, seen(model), console)
    chosen = verdict.candidate
    on_calibration = measured(kept_by(chosen.steps, chosen.ranker, calibrated, seen(model)))
    return profile.make(model, verdict, calibrated, on_calibration, held_out, target, price)


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # bf16 took five times as long as fp32 on a CPU without instructions for it.
    dtype = args.dtype or ("float32" if device.type == "cpu" else "auto")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(args.model)
