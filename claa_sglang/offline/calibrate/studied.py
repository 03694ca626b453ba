"""Prompts with their studies: made once, kept on disk where asked for, grouped by source of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from claa_sglang.offline.calibrate.evidence import Evidence, gather
from claa_sglang.offline.calibrate.target import CalibrationError
from claa_sglang.offline.samples import Sample, sample
from claa_sglang.offline.study import PromptStudy, load_or_study, study
from claa_sglang.ranking.rankers import Claa
from claa_sglang.tasks.record import Prompt

LEAST = 8  # prompts of one source: with fewer an interval says nothing


class Studied(NamedTuple):
    """Prompts of one name (a source of text, or several joined), their studies, and both as tensors."""

    name: str
    samples: tuple[Sample, ...]
    studies: tuple[PromptStudy, ...]
    evidence: Evidence


def study_all(
    prompts: Sequence[Prompt], model: Any, tokenizer: Any, directory: Path | None, what: str
) -> list[tuple[Sample, PromptStudy]]:
    """Every prompt, encoded and studied; from `directory` what is there already. what: for the progress bar."""
    done = []
    for prompt in tqdm(prompts, unit="prompt", desc=what):
        one = sample(prompt, tokenizer)
        if directory is None:
            done.append((one, study(model, one.input_ids)))
        else:
            done.append((one, load_or_study(directory, model, one.input_ids)))
    return done


def group(
    pairs: Sequence[tuple[Sample, PromptStudy]], tokenizer: Any, reference_rate: float, ranker: Claa | None = None
) -> Studied:
    """All pairs (at least one) as one set; a needle counts where the model's own answer used it. For the rest see
    `evidence.gather`."""
    needles = [one.used(tokenizer.decode(seen.answer)) for one, seen in pairs]
    samples, studies = zip(*pairs, strict=True)
    name = "+".join(sorted({one.prompt.source for one in samples}))
    return Studied(name, samples, studies, gather(studies, needles, reference_rate, ranker))


def by_source(
    pairs: Sequence[tuple[Sample, PromptStudy]], tokenizer: Any, reference_rate: float, ranker: Claa | None = None
) -> list[Studied]:
    """One set per source of text. Raises CalibrationError for a source of fewer than LEAST prompts."""
    sources: dict[str, list[tuple[Sample, PromptStudy]]] = {}
    for pair in pairs:
        sources.setdefault(pair[0].prompt.source, []).append(pair)
    for source, of_source in sources.items():
        if len(of_source) < LEAST:
            raise CalibrationError(
                f"{len(of_source)} held-out prompts of source {source!r}: give at least {LEAST} of each source, or one "
                "`source` to all"
            )
    return [group(of_source, tokenizer, reference_rate, ranker) for of_source in sources.values()]
