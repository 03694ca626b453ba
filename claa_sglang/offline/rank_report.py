"""Rankers side by side, layer by layer, over a set of studied prompts: the numbers of `claa-sglang rank-report`.

"At layer l" means: the prune is after layer l. A ranker of one layer reads layer l, others the last n layers up to l.
The ablation varies CLAA's n, z-score, head maximum, pooling, queries, last query and carry. The paper's m, the first
layer whose decode KV is compressed, is not part of it: compressing early layers' KV is not implemented here, and m does
not enter a ranking.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import numpy as np
import torch
from scipy import stats
from torch import Tensor

from claa_sglang.offline.basics import CaptureError
from claa_sglang.offline.differences import Difference, differences
from claa_sglang.offline.measures import Measures, measure
from claa_sglang.offline.study import PromptStudy
from claa_sglang.ranking import rankers
from claa_sglang.ranking.spec import RankerSpec, parse

MEASURES = Measures._fields
ORACLE = "oracle"
ABLATED_LAYERS = (1, 2, 4, 8)
_SWITCHES = ("pool=after", "carry=0", "last=off", "queries=sum")  # ablated at one n only


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One measure of one ranker, over prompts and candidate prune layers.

    Attributes:
        mean: over prompts and layers. standard_error: of that mean, over prompts (each prompt's mean over layers).
        worst_layer, worst: the layer whose mean over prompts is lowest, and that mean.
        spread: standard deviation over layers of the mean over prompts: how much the choice of the layer matters.
        step: mean change, either way, from one candidate layer to the next: how much a layer off by one matters.
        half_depth: mean over prompts at the default prune layer, L // 2 - 1.
    """

    mean: float
    standard_error: float
    worst_layer: int
    worst: float
    spread: float
    step: float
    half_depth: float


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One measure of one ranker at every layer, over the `prompts` of which it is known; lists have one value per layer
    from layer 0."""

    prompts: int
    mean: list[float]
    standard_error: list[float]
    summary: Summary


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """One ranker: its name, how many layers it was given, and a curve per measure that is known of two prompts."""

    ranker: str
    scored: int
    curves: dict[str, Curve]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the tables and the plot show.

    Attributes:
        layers: of the model. first_layer, last_layer: the candidates for a prune layer that summaries are over.
        prompts: how many, by source of text.
        rankers: over all prompts. by_source: the same over the prompts of each source, where there are several.
        ablation: CLAA's variants, over all prompts.
        differences: CLAA against each other ranker, in mass and answer. effects: against CLAA with one thing changed.
    """

    model: str
    layers: int
    first_layer: int
    last_layer: int
    keep_rate: float
    window: int
    scored: int
    prompts: dict[str, int]
    tokens: tuple[int, int]
    rankers: list[Ranked]
    by_source: dict[str, list[Ranked]]
    ablation: list[Ranked]
    differences: list[Difference]
    effects: list[Difference]
    versions: dict[str, str] = {}


class Studied(msgspec.Struct, frozen=True):
    """A studied prompt with the source of its text.

    given: rankings of it made elsewhere, fp32 [N], by name. needed: as `measures.measure` takes it.
    """

    study: PromptStudy
    source: str
    given: dict[str, Tensor] = {}
    needed: Tensor | None = None


def build(
    prompts: Sequence[Studied],
    names: Sequence[str],
    *,
    keep_rate: float,
    scored: int,
    progress: Callable[[Iterable[Studied]], Iterable[Studied]] = iter,
) -> Report:
    """Measure every ranker at every layer over studied prompts (at least two, of one model and window).

    names: rankers as `spec.parse` reads them; the oracle itself and the prompts' given rankings are added.
    scored: layers that a ranker of several gets. progress: wraps the prompts, such as tqdm.
    Raises RankerError for a name, CaptureError for prompts that cannot be compared.
    """
    first = prompts[0].study if prompts else None
    if first is None or len(prompts) < 2:
        raise CaptureError(f"{len(prompts)} prompts: a standard error needs two or more; give more prompts")
    chosen = {name: (rankers.make(parse(name)), scored) for name in names}
    variants = dict(_ablation(scored))
    of_rankers, of_variants = [], []
    for prompt in progress(prompts):
        window, study = prompt.study.window, prompt.study
        given = {ORACLE: study.oracle, **prompt.given}
        elsewhere = {
            name: (rankers.Given(ranking=ranking[: study.tokens - window]), 1) for name, ranking in given.items()
        }
        of_rankers.append(_measure_all(prompt, chosen | elsewhere, keep_rate))
        of_variants.append(_measure_all(prompt, variants, keep_rate))

    sources = [prompt.source for prompt in prompts]
    span = (first.layers // 4, first.layers - 2)
    many = len(set(sources)) > 1
    groups = {s: [m for m, of in zip(of_rankers, sources, strict=True) if of == s] for s in sorted(set(sources))}
    lengths = [prompt.study.tokens for prompt in prompts]
    return Report(
        model=first.about.model,
        layers=first.layers,
        first_layer=span[0],
        last_layer=span[1],
        keep_rate=keep_rate,
        window=first.window,
        scored=scored,
        prompts={source: len(group) for source, group in groups.items()},
        tokens=(min(lengths), max(lengths)),
        rankers=_summarised(of_rankers, span),
        by_source={s: _summarised(group, span) for s, group in groups.items() if many and len(group) > 1},
        ablation=_summarised(of_variants, span),
        differences=_against("claa", list(of_rankers[0]), of_rankers, of_rankers, span),
        effects=_against(f"n={scored} claa", _one_change(scored), of_variants, of_rankers, span),
    )


_Entry = tuple[rankers.Ranker, int]  # a ranker and how many layers it gets
_Measured = dict[str, tuple[int, np.ndarray]]  # name -> scored layers, fp64 [measures, L]


def _ablation(scored: int) -> Iterable[tuple[str, _Entry]]:
    """CLAA with n layers, z-score on or off, head maximum or sum; then, at the given n, each other switch.

    Those are pooling after the fold, nothing carried, no places by the last query alone, the mass of the last 8
    queries, and the paper's rule, which is such a mass with nothing carried.
    """
    counts = sorted({*ABLATED_LAYERS, scored})
    for count, zscore, heads in itertools.product(counts, (True, False), ("max", "sum")):
        spec = RankerSpec(zscore=zscore, heads="max" if heads == "max" else "sum")
        yield f"n={count} {spec}", (rankers.make(spec), count)
    for switches in (*_SWITCHES, "paper"):
        spec = parse(f"claa:{switches}")
        yield f"n={scored} {spec}", (rankers.make(spec), scored)


def _one_change(scored: int) -> list[str]:
    """The variants that differ from CLAA with its given n in one thing."""
    layers = [f"n={count} claa" for count in ABLATED_LAYERS if count != scored]
    return [*layers, *(f"n={scored} claa:{switch}" for switch in ("zscore=off", "heads=sum", *_SWITCHES))]


def _measure_all(prompt: Studied, entries: Mapping[str, _Entry], keep_rate: float) -> _Measured:
    measured: _Measured = {}
    study = prompt.study
    for name, (ranker, scored) in entries.items():
        # Rankings that look at no layer are the same at every layer.
        layers = [study.layers - 1] if ranker.statistic == "nothing" else list(range(study.layers))
        rankings = [study.rank(ranker, range(max(0, layer - scored + 1), layer + 1)) for layer in layers]
        values = np.stack(measure(study, torch.stack(rankings), keep_rate, prompt.needed))
        measured[name] = (scored, np.broadcast_to(values, (len(MEASURES), study.layers)))
    return measured


def _summarised(prompts: Sequence[_Measured], span: tuple[int, int]) -> list[Ranked]:
    result = []
    for name, (scored, _) in prompts[0].items():
        values = np.stack([prompt[name][1] for prompt in prompts])  # [prompts, measures, L]
        known = [(name, _known(values[:, index])) for index, name in enumerate(MEASURES)]
        curves = {measure: _curve(of, span) for measure, of in known if len(of) > 1}
        result.append(Ranked(ranker=name, scored=scored, curves=curves))
    return result


def _against(
    ours: str, others: Sequence[str], measured: Sequence[_Measured], best: Sequence[_Measured], span: tuple[int, int]
) -> list[Difference]:
    """`ours` against `others` in mass and answer over the candidate layers; nothing if `ours` was not asked for."""
    found: list[Difference] = []
    if ours not in measured[0]:
        return found

    for kind in ("mass", "answer"):

        def of(prompts: Sequence[_Measured], name: str, index: int = MEASURES.index(kind)) -> np.ndarray:
            return _known(np.stack([prompt[name][1][index, span[0] : span[1] + 1] for prompt in prompts]))

        values = {name: of(measured, name) for name in (ours, *others)}
        if len(values[ours]) > 1:
            found += differences(kind, values, ours, [name for name in others if name != ours], of(best, ORACLE))
    return found


def _known(values: np.ndarray) -> np.ndarray:
    """The prompts, fp64 [prompts, layers], of which the measure is known."""
    return values[~np.isnan(values).any(axis=1)]


def _curve(values: np.ndarray, span: tuple[int, int]) -> Curve:
    """values: fp64 [prompts, L]. span: first and last candidate layer, both included."""
    by_layer = values.mean(axis=0)
    candidates = slice(span[0], span[1] + 1)
    worst = span[0] + int(by_layer[candidates].argmin())
    summary = Summary(
        mean=float(by_layer[candidates].mean()),
        standard_error=float(stats.sem(values[:, candidates].mean(axis=1))),
        worst_layer=worst,
        worst=float(by_layer[worst]),
        spread=float(by_layer[candidates].std()),
        step=float(np.abs(np.diff(by_layer[candidates])).mean()),
        half_depth=float(by_layer[values.shape[1] // 2 - 1]),
    )
    return Curve(
        prompts=len(values), mean=by_layer.tolist(), standard_error=stats.sem(values, axis=0).tolist(), summary=summary
    )
