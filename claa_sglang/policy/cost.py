"""What a prefill costs: a few constants of this machine and model, measured at start and refined by every step served.

Only comparisons are made with it (`policy.py`), so what all ways share, such as queueing, is left out. Host-side: no
torch, no SGLang.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

FORGET = 0.98  # weight of a step after one more step: the last fifty or so decide
OUTLIER = 3.0  # a step this many times slower or faster than expected (a kernel compiles) counts as this many times
PRIOR = 1e-3  # steps that the constants at start count for
BOUNDS = (0.02, 50.0)  # of a constant, as a multiple of what was measured at start


class Work(NamedTuple):
    """What the layers of one forward, or of a whole prefill, have to do; sums over layers.

    passes: layers run, whatever their rows: weights are read, kernels launched.
    rows: tokens per layer. pairs: query-key pairs per layer, in a causal mask. prunes: forwards that rank and prune.
    eager: those of the passes whose kernels are launched one by one, not by a CUDA graph.
    """

    passes: float = 0
    rows: float = 0
    pairs: float = 0
    prunes: float = 0
    eager: float = 0

    def plus(self, other: Work) -> Work:
        """Both together."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class Constants(NamedTuple):
    """Seconds for one of each kind of `Work`, in its order."""

    per_pass: float
    per_row: float
    per_pair: float
    per_prune: float
    per_eager: float = 0.0  # launching a layer's kernels, beyond what it computes: nothing where that takes longer


def span_work(layers: int, prefix: int, end: int) -> Work:
    """Layers over tokens [prefix, end) of one sequence in one eager forward; nothing if that is empty."""
    rows = end - prefix
    if rows <= 0:
        return Work()
    return Work(layers, layers * rows, layers * (rows * prefix + rows * (rows + 1) / 2), eager=layers)


def prefill_work(layers: int, prefix: int, end: int, chunk: int, graph_tokens: int = 0) -> Work:
    """As `span_work`, in forwards of at most `chunk` tokens; those of at most `graph_tokens` run in a CUDA graph."""
    whole, rest = divmod(max(0, end - prefix), chunk)
    eager = whole * (chunk > graph_tokens) + (rest > graph_tokens)
    return span_work(layers, prefix, end)._replace(passes=layers * (whole + (rest > 0)), eager=layers * eager)


def pruned_work(
    prune_layers: Iterable[int], kept: Iterable[int], num_layers: int, prefix: int, end: int, chunk: int
) -> Work:
    """Early layers over tokens [prefix, end) of a prompt, and after each prune layer its kept tokens; all eagerly."""
    prunes = list(prune_layers)
    total = prefill_work(prunes[0] + 1, prefix, end, chunk)
    for first, last, count in zip(prunes, [*prunes[1:], num_layers - 1], kept, strict=True):
        total = total.plus(prefill_work(last - first, 0, count, chunk))._replace(prunes=1)
    return total


class Costs(Protocol):
    """What a prefill is expected to cost. constants: by which it is reckoned."""

    @property
    def constants(self) -> Constants: ...

    def seconds(self, work: Work) -> float:
        """Expected time of `work`."""


class GivenCosts(NamedTuple):
    """By constants that another process learns; see `Costs`."""

    constants: Constants

    def seconds(self, work: Work) -> float:
        """Expected time of `work`."""
        return float(np.dot(work, self.constants))


class CostModel:
    """seconds = work x constants, by least squares on relative errors that forgets old steps.

    The constants measured at start count as a part of a step, so what no step has shown yet stays as it was measured.
    """

    def __init__(self, start: Constants) -> None:
        self._start = np.array(start, dtype=float)
        self._factors = np.ones(len(start))  # the constants, as multiples of those at start
        self._matrix = np.zeros((len(start), len(start)))
        self._vector = np.zeros(len(start))
        self.steps = 0
        self.expected_seconds = self.measured_seconds = 0.0  # of those steps, as expected before each and as measured

    @property
    def constants(self) -> Constants:
        """As they are now."""
        return Constants(*(self._start * self._factors).tolist())

    def seconds(self, work: Work) -> float:
        """Expected time of `work`."""
        return float(np.dot(work, self._start * self._factors))

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from one forward that took `seconds`."""
        expected = self.seconds(work)
        if expected <= 0:
            return
        self.expected_seconds += expected
        self.measured_seconds += seconds
        measured = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        relative = np.array(work, dtype=float) * self._start / measured
        self._matrix = FORGET * self._matrix + np.outer(relative, relative)
        self._vector = FORGET * self._vector + relative
        solved = np.linalg.solve(self._matrix + PRIOR * np.eye(len(relative)), self._vector + PRIOR)
        self._factors = np.clip(solved, *BOUNDS)
        self.steps += 1
