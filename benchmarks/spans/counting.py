"""From studied prompts to how often an answer stays whole, and to the keep rates that this takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from torch import Tensor

from benchmarks.spans.minimal import minimal_kept
from claa_sglang.config.budget import kept_count
from claa_sglang.offline.study import PromptStudy
from claa_sglang.ranking.rankers import Ranker

ALL = "all"  # tasks together
Layers = tuple[int, ...]


class Group(NamedTuple):
    """Prompts that are counted together. form: how they end, one of `span_study.FORMS`; length: in tokens."""

    form: str
    length: int
    task: str


class Outcome(NamedTuple):
    """One prompt under one ranker and set of scored layers.

    kept: tokens that must be kept until the answer is whole, of `tokens`, the window's `window` among them.
    """

    group: Group
    ranker: str
    layers: Layers
    kept: int
    tokens: int
    window: int

    def whole(self, keep_rate: float) -> bool:
        """Whether a server at this keep rate keeps every token that the answer copies."""
        return self.kept <= kept_count(self.tokens, keep_rate, self.window)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts of a form, length and task under one ranker and set of scored layers.

    Attributes:
        task: or `all`. n: how many prompts.
        whole: for each keep rate the share of prompts with a whole answer.
        minimal: median, 90th percentile and maximum over prompts of the smallest keep rate with a whole answer.
    """

    form: str
    length: int
    task: str
    ranker: str
    layers: list[int]
    n: int
    whole: list[float]
    minimal: list[float]


def outcomes(
    group: Group, study: PromptStudy, needed: Tensor, rankers: Mapping[str, Ranker], layer_sets: Sequence[Layers]
) -> list[Outcome]:
    """One prompt under every ranker (by name) and set of layers. needed: bool [N], as `minimal_kept` takes it."""
    return [
        Outcome(
            group, name, layers, minimal_kept(study.rank(ranker, layers), needed, study.window),
            study.tokens, study.window,
        )
        for name, ranker in rankers.items()
        for layers in layer_sets
    ]  # fmt: skip


def rows(found: Iterable[Outcome], keep_rates: Sequence[float]) -> list[Row]:
    """A row for every form, length, ranker and set of layers, over all tasks and for each; in order of appearance."""
    together: dict[tuple[Group, str, Layers], list[Outcome]] = defaultdict(list)
    for one in found:
        for task in (ALL, one.group.task):
            together[one.group._replace(task=task), one.ranker, one.layers].append(one)
    return [_row(group, ranker, layers, prompts, keep_rates) for (group, ranker, layers), prompts in together.items()]


def _row(group: Group, ranker: str, layers: Layers, prompts: Sequence[Outcome], keep_rates: Sequence[float]) -> Row:
    minimal = np.array([one.kept / one.tokens for one in prompts])
    return Row(
        form=group.form,
        length=group.length,
        task=group.task,
        ranker=ranker,
        layers=list(layers),
        n=len(prompts),
        whole=[float(np.mean([one.whole(rate) for one in prompts])) for rate in keep_rates],
        minimal=[float(np.median(minimal)), float(np.quantile(minimal, 0.9)), float(minimal.max())],
    )
