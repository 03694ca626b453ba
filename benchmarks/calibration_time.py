"""How long a calibration takes after its studies: search, bounds and report, on made-up studies of a given shape.

    python -m benchmarks.calibration_time --out FILE [--layers 24 --kv-heads 2 --prompts 90 --held-out 90]

A made-up study has attention that is noise but for the answer, which some layers see. So there is something to find,
and what is found says nothing about a model. Reported: seconds of wall and of the process's CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from claa_sglang.offline.calibrate.choose import Question, choose
from claa_sglang.offline.calibrate.command import KEEP_RATES
from claa_sglang.offline.calibrate.default import default_ranker
from claa_sglang.offline.calibrate.price import Price
from claa_sglang.offline.calibrate.ranker_list import RANKERS, read
from claa_sglang.offline.calibrate.schedule import estimated
from claa_sglang.offline.calibrate.studied import Shape, Studied, group
from claa_sglang.offline.calibrate.target import CalibrationError, Target
from claa_sglang.offline.records import Subject
from claa_sglang.offline.samples import Needle, Sample
from claa_sglang.offline.study import PromptStudy
from claa_sglang.policy.cost import Constants
from claa_sglang.ranking.rankers import Statistic
from claa_sglang.tasks.record import Prompt

WINDOW, ANSWER = 32, 30  # tokens
SEEN = 0.03  # of a softmax, on the first tokens of an answer, in a layer that sees it


def made_up(layers: int, kv_heads: int, tokens: int, seed: int, source: str) -> tuple[Sample, PromptStudy]:
    """A prompt whose answer is ANSWER tokens somewhere; later layers see its beginning more often than earlier ones."""
    rng = torch.Generator().manual_seed(seed)
    ranked = tokens - WINDOW
    start = int(torch.randint(1, ranked - ANSWER, (), generator=rng))
    answer = torch.zeros(tokens, dtype=torch.bool)
    answer[start : start + ANSWER] = True
    statistics: dict[Statistic, torch.Tensor] = {}
    sees = torch.rand(layers, generator=rng) < torch.arange(layers) / layers
    for name in ("window_peak", "window_mass", "last_mass"):
        noise = torch.rand(layers, kv_heads, ranked, generator=rng).pow(8) * SEEN
        noise[sees, :, start : start + 4] += SEEN
        statistics[name] = noise
    oracle = torch.rand(tokens, generator=rng) * 1e-4
    oracle[answer] = 0.02
    about = Subject(
        kind="study", model="made up", fingerprint="f" * 64, prompt=f"{seed:064}", tokens=tokens,
        options={"window": WINDOW},
    )  # fmt: skip
    prompt = Prompt(prompt="made up", source=source, seed=seed, length=tokens)
    needles = (Needle("", answer),)
    study = PromptStudy(about, statistics, oracle, ())
    return Sample(prompt, torch.zeros(tokens, dtype=torch.int64), needles), study


class _NoTokenizer:
    def decode(self, ids: object) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=90, help="to choose on")
    parser.add_argument("--held-out", type=int, default=90, help="in two sources of text")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    rankers, threads = read(RANKERS), torch.get_num_threads()
    shape = Shape(0.2, (*rankers, default_ranker(args.layers)), args.device)

    def prompts(count: int, source: str) -> Studied:
        torch.set_num_threads(1)  # small operations
        made = [made_up(args.layers, args.kv_heads, args.tokens, seed, source) for seed in range(count)]
        torch.set_num_threads(threads)
        began.append((time.perf_counter(), time.process_time()))
        return group(made, _NoTokenizer(), shape)

    began: list[tuple[float, float]] = []
    half = args.held_out // 2
    folding = [0.0, 0.0]
    sets = []
    for count, source in ((args.prompts, "prose"), (half, "repeated"), (args.held_out - half, "sentences")):
        sets.append(prompts(count, source))
        ended = (time.perf_counter(), time.process_time())
        folding = [total + end - begin for total, end, begin in zip(folding, ended, began[-1], strict=True)]
    calibrated, *held_out = sets
    price = Price(Constants(0.0, 1.0, 0.0, 0.0), args.layers, 32768, WINDOW)
    layers = range(args.layers // 4, args.layers - 1)
    question = Question(Target(whole=0.5), rankers, KEEP_RATES, layers, price)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        chosen = str(choose(question, calibrated, held_out, estimated, Console()).candidate)
    except CalibrationError as error:
        chosen = f"nothing: {error}"
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    result = {
        "command": f"python -m benchmarks.calibration_time {' '.join(sys.argv[1:])}",
        "versions": {package: version(package) for package in ("claa-sglang", "torch", "numpy")},
        "shape": {key: getattr(args, key) for key in ("layers", "kv_heads", "prompts", "held_out", "tokens", "device")},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": threads},
        "folding_s": {"wall": round(folding[0], 1), "cpu": round(folding[1], 1)},
        "choosing_s": {"wall": round(wall, 1), "cpu": round(cpu, 1)},
        "chosen": chosen,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
