"""Prompts with their studies: made once, kept on disk where asked for, grouped by source of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from claa_sglang.offline.basics import MAX_ANSWER_TOKENS, WINDOW
from claa_sglang.offline.calibrate.evidence import Evidence
from claa_sglang.offline.calibrate.gather import gather
from claa_sglang.offline.calibrate.target import CalibrationError
from claa_sglang.offline.calibrate.threads import one_thread
from claa_sglang.offline.samples import Sample, sample
from claa_sglang.offline.study import PromptStudy, load_or_study, study
from claa_sglang.ranking.spec import RankerSpec
from claa_sglang.tasks.record import Prompt

LEAST = 8  # prompts of one source: with fewer an interval says nothing
MOST_ANSWER_TOKENS = 256  # of a study, whatever room a prompt gives: each is a step of the model


class Studied(NamedTuple):
    """Prompts of one name (a source of text, or several joined), their studies, and both as tensors.

    longest: of each prompt, the most tokens of one needle that the model's answer repeats.
    """

    name: str
    samples: tuple[Sample, ...]
    studies: tuple[PromptStudy, ...]
    evidence: Evidence
    longest: tuple[int, ...] = ()


class Shape(NamedTuple):
    """How studies become evidence; see `gather.gather`."""

    reference_rate: float
    rankers: tuple[RankerSpec, ...]
    device: torch.device | str = "cpu"


def study_all(
    prompts: Sequence[Prompt], model: Any, tokenizer: Any, directory: Path | None, what: str
) -> list[tuple[Sample, PromptStudy]]:
    """Every prompt, encoded and studied; from `directory` what is there already. what: for the progress bar.

    The answer is as long as the prompt has room for: of a copy that is cut short, only the beginning would count.
    """
    done = []
    for prompt in tqdm(prompts, unit="prompt", desc=what):
        one = sample(prompt, tokenizer)
        most = answer_tokens(prompt)
        if directory is None:
            made = study(model, one.input_ids, window=WINDOW, max_answer_tokens=most)
        else:
            made = load_or_study(directory, model, one.input_ids, window=WINDOW, max_answer_tokens=most)
        done.append((one, made))
    return done


def answer_tokens(prompt: Prompt) -> int:
    """Where the answer to a prompt is cut. A study's record has it among its options."""
    return min(prompt.max_new_tokens or MAX_ANSWER_TOKENS, MOST_ANSWER_TOKENS)


def group(pairs: Sequence[tuple[Sample, PromptStudy]], tokenizer: Any, shape: Shape) -> Studied:
    """All pairs (at least one) as one set; a needle counts where the model's own answer used it."""
    answers = [tokenizer.decode(seen.answer) for _, seen in pairs]
    needed = [one.used(answer) for (one, _), answer in zip(pairs, answers, strict=True)]
    samples, studies = zip(*pairs, strict=True)
    with one_thread():
        evidence = gather(studies, needed, [one.prompt.length for one in samples], *shape)
    return Studied(
        "+".join(sorted({one.prompt.source for one in samples})),
        samples,
        studies,
        evidence,
        tuple(one.longest(answer) for one, answer in zip(samples, answers, strict=True)),
    )


def by_source(pairs: Sequence[tuple[Sample, PromptStudy]], tokenizer: Any, shape: Shape) -> list[Studied]:
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
    return [group(of_source, tokenizer, shape) for of_source in sources.values()]
