"""Everything a run will need, looked at before its first server starts."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from multiprocessing import TimeoutError as NotYet
from multiprocessing.pool import Pool
from pathlib import Path

from benchmarks.answers import fleet, lanes, prompts
from benchmarks.answers.asking import ROOT
from benchmarks.answers.plan import Model, Plan
from benchmarks.answers.prompts import Item
from benchmarks.quality.index import Entry
from claa_sglang.ranking.spec import RankerError, parse
from claa_sglang.tasks.generate import TASKS
from claa_sglang.tools.servers import free_port

PACKAGES = ("sglang", "torch", "transformers", "msgspec", "numpy", "scipy", "requests", "psutil", "tqdm", "rich")
PACKAGES += ("wonderwords", "gensim")
BYTES_PER_TOKEN = 7  # of a prompt in JSON
SPARE = 2e9  # bytes of disk for answers, logs and caches of kernels
LEAST = 30  # seconds of asking


class CheckError(ValueError):
    """The run cannot succeed; the message has a line for each reason."""


def quick(plan: Plan, paths: Mapping[str, Path], out: Path, temp: Path, seconds: float, gpus: int, cpu: bool) -> None:
    """What costs no time. Raises CheckError."""
    wrong = [f"package {name} is missing" for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not any(one.name == "claa" for one in entry_points(group="sglang.srt.plugins")):
        wrong.append("claa-sglang is not installed: SGLang finds no plugin `claa` (pip install .)")
    if seconds - plan.finish < LEAST:
        wrong.append(f"--seconds {seconds:g}: {plan.finish:g} are for the end, and at least {LEAST} for asking")
    if any((out / name).exists() for name in ("answers", "raw", "logs")):
        wrong.append(f"{out} has a run in it: name another --out")
    for name, model in plan.models.items():
        wrong += _model(name, model, paths[name])
    wrong += [] if cpu else _gpus(gpus)
    fleet_size = len(fleet.wanted(plan, paths, gpus, cpu))
    if len({free_port() for _ in range(fleet_size)}) < fleet_size:
        wrong.append(f"there are not {fleet_size} free ports on 127.0.0.1")
    need = SPARE + BYTES_PER_TOKEN * sum(2 * chunk.length * chunk.count for chunk in prompts.chunks(plan, paths))
    free = shutil.disk_usage(temp).free
    if free < need:
        wrong.append(f"{temp} has {free / 1e9:.1f} GB free, and prompts need {need / 1e9:.1f}: set TMPDIR")
    if wrong:
        raise CheckError("\n".join(wrong))


def _model(name: str, model: Model, path: Path) -> list[str]:
    wrong = [f"{path}: no {file}" for file in ("config.json", "tokenizer_config.json") if not (path / file).is_file()]
    if not any(path.glob("*.safetensors")):
        wrong.append(f"{path}: no *.safetensors")
    wrong += [f"{name}: no task {task!r}" for task in model.tasks if task not in TASKS]
    if not wrong:
        most = json.loads((path / "config.json").read_text()).get("max_position_embeddings", 1 << 30)
        if (longest := max([*model.lengths, *model.only_timed])) >= most:
            wrong.append(f"{name}: prompts of {longest} tokens, and the model takes {most}")
    for ranker in [*(model.rankers.rankers if model.rankers else []), *(model.times.rankers if model.times else [])]:
        try:
            parse(ranker)
        except RankerError as error:
            wrong.append(f"{name}: {error}")
    return wrong


def _gpus(gpus: int) -> list[str]:
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi: {error}; --cpu runs without a GPU"]
    found = sum(line.startswith("GPU ") for line in said.stdout.splitlines())
    if found < gpus:
        return [f"--gpus {gpus}: nvidia-smi sees {found}"]
    seen = os.environ.get(fleet.VISIBLE, "")
    return [f"--gpus {gpus}: {fleet.VISIBLE} is {seen}"] if seen and len(seen.split(",")) < gpus else []


def commands(plan: Plan, gpus: int) -> None:
    """Commands of every step, parsed by what will parse them. Raises CheckError."""
    from benchmarks import eval_quality

    for name, model in plan.models.items():
        steps = lanes.work(name, model, _stand_ins(plan, model), gpus)
        for step in [*steps.times, *steps.special, *steps.shards]:
            words = lanes.command(step, Path("/prompts"), Path("/out"), "http://a", "http://b", 99)
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    eval_quality.parse_args(words)
            except SystemExit:
                raise CheckError(f"{step.name}: {said.getvalue().strip().splitlines()[-1]}") from None


def _stand_ins(plan: Plan, model: Model) -> dict[str, Sequence[Item]]:
    """What the plan's prompts will be, without their text."""

    def items(tasks: Sequence[str], lengths: Sequence[int], count: int, seed: int) -> list[Item]:
        return [
            Item(Entry(key="", task=task, source="", form=form, length=length, seed=seed + one, answers=[]), b"")
            for task in tasks
            for length in lengths
            for form in plan.sources
            for one in range(count)
        ]

    chats, times = model.turns, model.times
    return {
        prompts.ANSWERS: items(model.tasks, model.lengths, model.count, model.seed),
        prompts.TIMES: items(times.tasks, model.only_timed, times.prompts, model.seed) if times else [],
        prompts.TURNS: items(chats.tasks, chats.lengths, chats.count, chats.seed) if chats else [],
    }


def slow(plan: Plan, paths: Mapping[str, Path], gpus: int, cpu: bool, pool: Pool, timeout: float) -> None:
    """Flags of servers, parsed by SGLang, and a prompt of every kind, side by side. Raises CheckError."""
    flags = json.dumps([one.flags for one in fleet.wanted(plan, paths, gpus, cpu)])
    parsing = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.answers.flags"],
        cwd=ROOT,
        env={**os.environ, **(fleet.environment(0, cpu) if cpu else {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        made = pool.map_async(prompts.make_chunk, prompts.samples(plan, paths), chunksize=1)
        said, errors = parsing.communicate(flags, timeout=timeout)
        if parsing.returncode:
            raise CheckError(said.strip() or errors.strip()[-2000:])
        if wrong := [f"{one.chunk}: {one.error}" for one in made.get(timeout) if one.error]:
            raise CheckError("\n".join(wrong))
    except (subprocess.TimeoutExpired, NotYet):
        raise CheckError(f"checks took more than {timeout:.0f} s: give more --seconds") from None
    finally:
        parsing.kill()
        parsing.wait()
