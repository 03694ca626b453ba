"""`claa-sglang plan`: the command line. Nothing heavy is imported before it measures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec

from claa_sglang.plan.error import PlanError
from claa_sglang.plan.machine import ITEMSIZE, REMEDY, Machine, load
from claa_sglang.plan.model import Shape, read
from claa_sglang.plan.predict import Prune
from claa_sglang.plan.room import last_prune_layer
from claa_sglang.plan.rows import Asked, plan
from claa_sglang.plan.table import FORMULA, text

KEEP_RATES = (0.1, 0.2, 0.4)
CHUNK = 8192  # of SGLang on a GPU of 80 GB and more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="directory with a config.json, or that file; weights are not read")
    parser.add_argument("--prompt-tokens", type=int, help="of a prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    where = parser.add_argument_group("machine", "One of them is needed.")
    where.add_argument("--machine", metavar="FILE", help="record of a machine, or the name of one that is shipped")
    where.add_argument("--measure", action="store_true", help="make a record of this machine, in seconds")
    where.add_argument("--out", type=Path, metavar="FILE", help="where --measure writes it (default: it is printed)")
    where.add_argument(
        "--dtype", choices=tuple(ITEMSIZE), help="that --measure measures (default: bfloat16, on a CPU float32)"
    )
    how = parser.add_argument_group("pruning")
    how.add_argument(
        "--keep-rate", type=float, nargs="+", default=KEEP_RATES, help="one or more (default: 0.1 0.2 0.4)"
    )
    how.add_argument("--prune-layer", type=int, nargs="+", help="one or more (default: a third, half, two thirds)")
    how.add_argument("--window", type=int, default=32, help="tokens that are always kept (default: %(default)s)")
    use = parser.add_argument_group("traffic and server")
    use.add_argument("--question-tokens", type=int, default=64, help="of a second turn (default: %(default)s)")
    use.add_argument("--answer-tokens", type=int, default=256, help="that take memory (default: %(default)s)")
    use.add_argument(
        "--chunked-prefill-size",
        type=int,
        default=CHUNK,
        help="tokens of a step, -1 for no limit (default: %(default)s)",
    )
    use.add_argument("--max-total-tokens", type=int, help="KV slots of the server (default: from the machine's memory)")
    use.add_argument(
        "--mem-fraction-static", type=float, default=0.85, help="of memory, for weights and KV (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Print a plan, or a machine's record, or both. Raises PlanError, and OSError of --out."""
    shape = None if args.model is None else read(args.model)
    machine = _machine(args, shape)
    if args.prompt_tokens is None:
        if not args.measure:
            raise PlanError("--prompt-tokens is missing: give the length of a prompt, such as --prompt-tokens 32768")
        if args.out is None:
            print(machine.to_json(), end="")
        return
    if shape is None:
        raise PlanError("--model is missing: give a directory with a config.json, or that file")
    asked, prunes = _asked(args, shape), _prunes(args, shape, machine)
    made = plan(shape, machine, asked, prunes)
    if not args.json:
        print(text(shape, machine, asked, made))
        return
    record: dict[str, Any] = {
        "model": shape._asdict() | {"weights": shape.weights},
        "machine": msgspec.to_builtins(machine),
        "asked": asked._asdict(),
        "pool": made.pool,
        "stock": made.stock._asdict(),
        "rows": [row._asdict() for row in made.rows],
        "formula": list(FORMULA),
    }
    print(json.dumps(record, indent=1))


def _machine(args: argparse.Namespace, shape: Shape | None) -> Machine:
    if args.measure and args.machine is not None:
        raise PlanError("--measure and --machine: give one of them")
    if not args.measure:
        for flag, value in {"--out": args.out, "--dtype": args.dtype}.items():
            if value is not None:
                raise PlanError(f"{flag} without --measure: add --measure, or leave {flag} out")
        if args.machine is None:
            raise PlanError(f"--machine is missing. {REMEDY}")
        return load(args.machine)
    from claa_sglang.plan.measure import measured  # imports torch

    machine = measured(args.dtype, shape)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(machine.to_json())
    return machine


def _asked(args: argparse.Namespace, shape: Shape) -> Asked:
    _at_least(1, "--prompt-tokens", args.prompt_tokens)
    _at_least(1, "--question-tokens", args.question_tokens)
    _at_least(0, "--answer-tokens", args.answer_tokens)
    if args.max_total_tokens is not None:
        _at_least(1, "--max-total-tokens", args.max_total_tokens)
    if not 0 < args.mem_fraction_static <= 1:
        raise PlanError(f"--mem-fraction-static {args.mem_fraction_static:g}: give a share above 0, at most 1")
    if not 1 <= args.window <= 1024:
        raise PlanError(f"--window {args.window}: give 1 to 1024 tokens")
    total = args.prompt_tokens + max(args.question_tokens, args.answer_tokens)
    if total > shape.context:
        raise PlanError(
            f"--prompt-tokens {args.prompt_tokens}: with its answer or a question that is {total:,} tokens, and "
            f"{shape.name} takes {shape.context:,} (max_position_embeddings). Give fewer"
        )
    chunk = shape.context if args.chunked_prefill_size == -1 else args.chunked_prefill_size
    if chunk < args.window:
        raise PlanError(
            f"--chunked-prefill-size {chunk}: a step must hold the window of {args.window} tokens. Give more, or -1"
        )
    return Asked(
        prompt=args.prompt_tokens,
        question=args.question_tokens,
        answer=args.answer_tokens,
        chunk=chunk,
        pool=args.max_total_tokens,
        fraction=args.mem_fraction_static,
    )


def _prunes(args: argparse.Namespace, shape: Shape, machine: Machine) -> list[Prune]:
    """Every prune layer with every keep rate."""
    last = last_prune_layer(shape, machine.itemsize)
    if last < 0:
        raise PlanError(
            f"{shape.name} in {machine.dtype}: no late layers' KV rows hold a token's state, so it cannot be pruned. "
            "Plan it in float32, or another model"
        )
    layers = args.prune_layer
    if layers is None:
        third = (shape.layers // 3, shape.layers // 2 - 1, 2 * shape.layers // 3)
        layers = sorted({min(layer, last) for layer in third})
    for layer in layers:
        if not 0 <= layer <= last:
            raise PlanError(
                f"--prune-layer {layer}: give 0 to {last}, after which the late layers' KV rows of {shape.name} in "
                f"{machine.dtype} hold a token's state"
            )
    for rate in args.keep_rate:
        if not 0 < rate <= 1:
            raise PlanError(f"--keep-rate {rate:g}: give a share above 0, at most 1")
    return [Prune(layer, rate, args.window) for layer in layers for rate in args.keep_rate]


def _at_least(least: int, flag: str, value: int) -> None:
    if value < least:
        raise PlanError(f"{flag} {value}: give {least} or more")
