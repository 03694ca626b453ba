"""What answers say: accuracy, how it differs from dense, and how far apart answers and first tokens are.

All intervals are 95 %. Answers of one prompt are paired, so that differences do not pay for hard and easy prompts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from scipy import stats

from benchmarks.quality.answers import Answer
from benchmarks.quality.settings import DENSE, Setting
from benchmarks.quality.turns import Graded, Question, questions
from claa_sglang.offline.interval import CONFIDENCE, Interval
from claa_sglang.tasks.grade import grade

RESAMPLES = 2000
ALL = "all"  # tasks, sources or forms: every prompt counts once
EVERY_LENGTH = 0
Group = tuple[int, str, str, str, int]  # turn, task, source, form, length


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A pruned setting beside dense, over the same prompts.

    difference: accuracy less dense's. only_dense, only_pruned: prompts that one got all right and the other did not;
    p_value: McNemar's exact test of whether these two counts differ by chance. agreement: share of prompts with the
    same answer, to the letter. first_token_kl: see `coarse_kl`, in nats, over first_token_n prompts.
    """

    difference: Interval
    only_dense: int
    only_pruned: int
    p_value: float
    agreement: Interval
    first_token_kl: Interval | None
    first_token_n: int


class Tokens(msgspec.Struct, frozen=True):
    """Medians of what the reports say. late_computed: None for dense, which has the same layers for all tokens."""

    prompt: float
    early_cached: float
    late_computed: float | None = None


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """Results of one setting over n prompts of one task, source and length (ALL, EVERY_LENGTH).

    form: `Prompt.form`, in cells over all sources. turn: of the chat; 1 is the first question. lead: accuracy of the
    first ranker at the same keep rate, less this one's, paired; None for the first and dense. tokens: None if only
    first questions were asked.
    """

    task: str
    source: str
    length: int
    ranker: str
    keep_rate: float
    n: int
    form: str = ALL
    turn: int = 1
    accuracy: Interval
    to_dense: Comparison | None = None
    lead: Interval | None = None
    tokens: Tokens | None = None


def cells(
    prompts: Sequence[Graded],
    known: Mapping[tuple[str, str], Answer],
    settings: Sequence[Setting],
    turns: int = 1,
) -> list[Cell]:
    """A cell per turn, task, source, length and setting; others over all tasks, sources, or several lengths.

    Where prompts have several forms, each has cells of its own, over all sources.

    known: by turn key and setting name. Questions that are not answered under every setting are left out, so that all
    settings are judged on the same ones. Questions without expected answers are left out as well.
    """
    groups: dict[Group, list[Question]] = defaultdict(list)
    several = len({prompt.length for prompt in prompts}) > 1
    forms = len({prompt.form for prompt in prompts}) > 1
    first = next((setting.ranker for setting in settings if not setting.dense), None)
    for one in questions(prompts, turns):
        if one.answers and all((one.key, setting.name) in known for setting in settings):
            for task in (one.task, ALL):
                for source, form in ((one.source, ALL), (ALL, ALL), *([(ALL, one.form)] if forms else [])):
                    for length in (one.length, EVERY_LENGTH) if several else (one.length,):
                        groups[one.turn, task, source, form, length].append(one)
    return [
        _cell(group, members, setting, known, first, counted=turns > 1)
        for group, members in sorted(groups.items())
        for setting in settings
    ]


def _cell(
    group: Group,
    asked: Sequence[Question],
    setting: Setting,
    known: Mapping[tuple[str, str], Answer],
    first: str | None,
    counted: bool,
) -> Cell:
    mine = [known[one.key, setting.name] for one in asked]
    scores = _scores(asked, mine)
    comparison = lead = None
    if not setting.dense:
        dense = [known[one.key, DENSE.name] for one in asked]
        comparison = compare(scores, _scores(asked, dense), mine, dense)
    if not setting.dense and setting.ranker != first:
        theirs = [known[one.key, Setting(first, setting.keep_rate).name] for one in asked]
        lead = mean(_scores(asked, theirs) - scores)
    return Cell(
        **dict(zip(("turn", "task", "source", "form", "length"), group, strict=True)),
        ranker=setting.ranker,
        keep_rate=setting.keep_rate,
        n=len(asked),
        accuracy=mean_score(scores),
        to_dense=comparison,
        lead=lead,
        tokens=_tokens(mine) if counted else None,
    )


def _tokens(answers: Sequence[Answer]) -> Tokens:
    computed = [answer.computed for answer in answers if answer.computed is not None]
    return Tokens(
        float(np.median([answer.tokens for answer in answers])),
        float(np.median([answer.cached or 0 for answer in answers])),
        float(np.median(computed)) if computed else None,
    )


def _scores(asked: Sequence[Question], answers: Sequence[Answer]) -> np.ndarray:
    """[n], float64, in [0, 1]."""
    return np.array([grade(a.text, one.answers, one.exact) for one, a in zip(asked, answers, strict=True)])


def compare(
    scores: np.ndarray, dense_scores: np.ndarray, answers: Sequence[Answer], dense: Sequence[Answer]
) -> Comparison:
    """A pruned setting beside dense; the i-th items belong to the i-th prompt. scores: [n], in [0, 1]."""
    right, dense_right = scores == 1, dense_scores == 1
    only_dense, only_pruned = int((dense_right & ~right).sum()), int((right & ~dense_right).sum())
    discordant = only_dense + only_pruned
    pairs = [(a.text.strip() == d.text.strip(), a.first, d.first) for a, d in zip(answers, dense, strict=True)]
    divergences = [coarse_kl(d, a) for _, a, d in pairs if a is not None and d is not None]
    return Comparison(
        difference=mean(scores - dense_scores),
        only_dense=only_dense,
        only_pruned=only_pruned,
        p_value=float(stats.binomtest(only_dense, discordant).pvalue) if discordant else 1.0,
        agreement=mean_score(np.array([same for same, _, _ in pairs], dtype=float)),
        first_token_kl=mean(np.array(divergences)) if divergences else None,
        first_token_n=len(divergences),
    )


def mean_score(scores: np.ndarray) -> Interval:
    """Mean of scores [n] in [0, 1]. Of right and wrong alone: Wilson's score interval; of shares: bootstrap."""
    if not np.isin(scores, (0, 1)).all():
        return mean(scores)
    found = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(scores.mean()), float(found.low), float(found.high))


def mean(values: np.ndarray) -> Interval:
    """Mean of values [n] with a percentile bootstrap over prompts.

    Where all values are equal, resampling would promise certainty. Then the interval allows for as many other values,
    each 1 away, as n equal draws leave possible (Clopper and Pearson).
    """
    middle = float(values.mean())
    if np.ptp(values) == 0:
        possible = float(stats.binomtest(0, len(values)).proportion_ci(CONFIDENCE, method="exact").high)
        return Interval(middle, middle - possible, middle + possible)
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(middle, float(found.low), float(found.high))


def coarse_kl(dense: Sequence[tuple[int, float]], pruned: Sequence[tuple[int, float]]) -> float:
    """KL(dense || pruned) of the next token in nats, from the likeliest tokens (id, log probability) of both.

    Tokens that both lists have are outcomes of their own; all others together are one more outcome, whose probability
    is what is left. Merging outcomes can only lower a divergence, so this is a lower bound, and 0 for equal
    distributions.
    """
    p, q = dict(dense), dict(pruned)
    shared = p.keys() & q.keys()
    rest_p = max(0.0, 1 - math.fsum(math.exp(p[token]) for token in shared))
    # Log probabilities are rounded: a rest of nothing is the smallest that float32 can tell from 1.
    rest_q = max(1e-7, 1 - math.fsum(math.exp(q[token]) for token in shared))
    total = math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    if rest_p > 1e-7:
        total += rest_p * math.log(rest_p / rest_q)
    return max(0.0, total)
