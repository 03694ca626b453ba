"""Time to first token, pruned against stock and against its bound, in one run.

    python -m benchmarks.bench_ttft --out ttft.json                  # SmolLM2; on the CPU engine where there is no GPU
    python -m benchmarks.bench_ttft --shape llama-3.1-8b --budget-seconds 570 --out ttft.json
    python -m benchmarks.bench_ttft --shape llama-3.1-8b --scenarios decode --decode-lengths 65536 --one-at-a-time ...
    python -m benchmarks.bench_ttft --plot ttft.json                 # table and figure of earlier runs

Engines live side by side (ttft/setup.py) and take turns, each serving the same prompts (ttft/scenarios.py); what a
pruned request cannot beat is measured in the same rounds, with truncated copies of the model (ttft/bound.py); ratios
are taken within rounds (ttft/report.py) and held against the issue's targets (ttft/targets.py). The file is written
again after every round, so a run that is killed keeps what it has. `rates` starts two HTTP servers of its own and sends
requests at random times with SGLang's benchmark client (ttft/rates.py); `startup` starts and stops engines and does
nothing else (ttft/startup.py).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import shapes
from benchmarks.ttft import plot, rates, record, report, setup, startup
from benchmarks.ttft.catalogue import SCENARIOS
from benchmarks.ttft.run import Budget, How, OutOfTime, Run
from benchmarks.ttft.settings import CPU_DEFAULTS, GPU_DEFAULTS, HELP, Chat, Settings
from claa_sglang.tools.cpu_env import enter_cpu_environment

OTHERS = {"rates": rates.measure, "startup": startup.measure}  # they start what they need themselves


def main(argv: list[str]) -> int:
    """Measure, or render earlier runs; 1 where the budget cut a run short, or something failed."""
    args = parse_args(argv)
    if args.plot:
        return render(args.plot)
    budget = Budget(args.budget_seconds)
    device, bandwidth = record.device()
    if not (gpu := bandwidth is not None):
        enter_cpu_environment()
    settings = settings_of(args, gpu)
    with contextlib.ExitStack() as stack:
        model = setup.open_model(args.model, args.shape, args.prune_layer, gpu, stack)
        result = record.Record(
            **record.provenance(argv),
            model=model.name,
            shape=model.config,
            itemsize=model.itemsize,
            device=device,
            bandwidth=bandwidth,
            prune_layer=model.prune_layer,
            settings=msgspec.to_builtins(settings) | {"scenarios": args.scenarios},
        )
        how = How(
            gpu=gpu,
            one_at_a_time=args.one_at_a_time,
            start_in_turn=args.start_in_turn,
            engines=args.engines,
            control=args.control,
            log_level=args.log_level,
        )
        run = Run(model, settings, how, budget, result, args.out)
        try:
            measure(run, args.scenarios)
            result.stopped = ""
        except OutOfTime as reason:
            result.stopped = str(reason)
        finally:
            run.save()
    report.print_record(result)
    print(args.out)
    return int(bool(result.stopped or result.errors))


def measure(run: Run, scenarios: list[str]) -> None:
    """Everything, at every chunk size. Raises OutOfTime."""
    together = [name for name in SCENARIOS if name in scenarios]
    for chunk in run.settings.chunks:
        if together:
            run.scenarios(together, chunk)
        for name, alone in OTHERS.items():
            if name in scenarios:
                alone(run, run.engine_options([name], chunk), chunk)


def render(paths: list[Path]) -> int:
    """Print the tables of `paths`, and draw one figure of all of them, beside the first."""
    records = [record.load(path) for path in paths]
    for loaded in records:
        report.print_record(loaded)
    figure = paths[0].with_suffix(".png")
    everything = [series for loaded in records for series in loaded.series]
    if plot.draw(msgspec.structs.replace(records[0], series=everything), figure):
        print(figure)
    return 0


def parse_args(argv: list[str]) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_ttft", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, help="directory of a checkpoint (default: SmolLM2-135M-Instruct)")
    what.add_argument("--shape", choices=shapes.SHAPES, help="random weights of this shape")
    what.add_argument("--plot", type=Path, nargs="+", metavar="JSON", help="render these results, measure nothing")
    parser.add_argument(
        "--scenarios",
        nargs="+",
        choices=[*SCENARIOS, *OTHERS],
        default=[name for name, scenario in SCENARIOS.items() if not scenario.pauses],
        help="default: all but rates, startup, and those with pauses (after-pause and what follows it in this list)",
    )
    parser.add_argument("--prune-layer", type=int, help="default: L//2 - 1 of a model's L")
    parser.add_argument("--budget-seconds", type=float, help="stop cleanly before a round that would exceed this")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="one engine lives at a time; nothing is interleaved"
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        metavar="NAME",
        help="of stock, claa, early, late, one: start these alone (default: all)",
    )
    parser.add_argument("--control", action="store_true", help="a second stock engine, held against the first")
    parser.add_argument("--start-in-turn", action="store_true", help="start engines one after another, not together")
    parser.add_argument("--log-level", default="error", help="of the engines (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=setup.ROOT / "benchmarks" / "results" / "ttft.json")
    group = parser.add_argument_group(
        "settings", "defaults on a GPU / on the CPU engine in brackets; lengths in tokens"
    )
    for name, text in HELP.items():
        gpu, cpu = getattr(GPU_DEFAULTS, name), getattr(CPU_DEFAULTS, name)
        kind: dict[str, Any] = {"type": type(gpu)}
        if isinstance(gpu, Chat):
            kind = {"type": int, "nargs": 3}
        elif isinstance(gpu, list):
            kind = {"type": type(gpu[0]), "nargs": "+"}
        group.add_argument("--" + name.replace("_", "-"), help=f"{text} [{gpu} / {cpu}]", **kind)
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace, gpu: bool) -> Settings:
    """The defaults of the device, and over them what was given."""
    given = {name: value for name in HELP if (value := getattr(args, name)) is not None}
    if "chat" in given:
        given["chat"] = Chat(*given["chat"])
    return msgspec.structs.replace(GPU_DEFAULTS if gpu else CPU_DEFAULTS, **given)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
