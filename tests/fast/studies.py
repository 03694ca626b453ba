"""Made-up studies of prompts, in which it is known which layer sees what."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from claa_sglang.offline.records import Subject
from claa_sglang.offline.samples import Needle, Sample
from claa_sglang.offline.study import PromptStudy
from claa_sglang.tasks.record import Prompt

LAYERS, TOKENS, WINDOW = 12, 208, 8
RANKED = TOKENS - WINDOW
NEEDLE = 7  # tokens, as wide as the pool, so that a layer that sees a needle ranks all of it first


def studied(
    sees: Mapping[int, float], seed: int, source: str = "prose", long: int = NEEDLE, seen: int | None = None
) -> tuple[Sample, PromptStudy]:
    """A prompt with a needle at a random place, which holds half of the oracle's mass; the rest is spread evenly.

    sees: for each layer the share of prompts in which its attention is on the needle; in all others it is noise.
    long: tokens of the needle, at most 20. seen: those at its beginning that are looked at; all of them by default.
    """
    rng = torch.Generator().manual_seed(seed)
    start = int(torch.randint(20, RANKED - 20, (), generator=rng))
    needle = torch.zeros(TOKENS, dtype=torch.bool)
    needle[start : start + long] = True
    mass = 0.01 * torch.rand(LAYERS, 1, RANKED, generator=rng)
    for layer, share in sees.items():
        if torch.rand((), generator=rng) < share:
            mass[layer, 0, start : start + (seen or long)] = 1.0
    oracle = torch.full((TOKENS,), 0.5 / (TOKENS - long))
    oracle[needle] = 0.5 / long
    about = Subject(
        kind="study", model="made up", fingerprint="f" * 64, prompt=f"{seed:064}", tokens=TOKENS,
        options={"window": WINDOW},
    )  # fmt: skip
    prompt = Prompt(prompt="made up", source=source, seed=seed, task="needle")
    # One tensor under each name, so that a test changes all of them.
    study = PromptStudy(about, {"window_peak": mass, "window_mass": mass, "last_mass": mass}, oracle, ())
    return Sample(prompt, torch.zeros(TOKENS, dtype=torch.int64), (Needle("", needle),)), study


class NoTokenizer:
    """Reads answers back as nothing: made-up prompts expect none."""

    def decode(self, ids: object) -> str:
        return ""


def prompts(sees: Mapping[int, float], count: int = 16, source: str = "prose") -> list[tuple[Sample, PromptStudy]]:
    return [studied(sees, seed, source) for seed in range(count)]
