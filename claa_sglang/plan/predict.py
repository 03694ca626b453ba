"""Predicted seconds to the first token: what the device computes, by `policy/cost.py`, and what the host launches.

A cost model of a server learns from its steps; here there are none to learn from, so launching is not a constant of a
layer but a time of its own, beside which the device computes what was launched before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from claa_sglang.config.budget import kept_count
from claa_sglang.plan.machine import Machine
from claa_sglang.plan.model import Shape
from claa_sglang.policy.cost import GivenCosts, span_work

GRAPH_TOKENS = 8192  # most tokens of a prefill that SGLang runs in a CUDA graph by default


class Prune(NamedTuple):
    """How a prompt is pruned. prune_layer: last early layer. keep_rate: share kept. window: tokens always kept."""

    prune_layer: int
    keep_rate: float
    window: int = 32


class Group(NamedTuple):
    """Some layers of one forward. host: seconds to launch them. device: seconds to compute them."""

    host: float
    device: float


class Predictor(NamedTuple):
    """For one model on one machine, with steps of `chunk` tokens."""

    machine: Machine
    shape: Shape
    chunk: int

    def dense(self, prefix: int, end: int) -> float:
        """Seconds to the first token of a prompt of `end` tokens, the first `prefix` of them cached, by stock."""
        graph = min(GRAPH_TOKENS, self.chunk)
        groups = [
            self._group(self.shape.layers, start, stop, graph=stop - start <= graph)
            for start, stop in _spans(prefix, end, self.chunk)
        ]
        return self._once + self._finish(groups)

    def pruned(self, prefix: int, end: int, prune: Prune) -> float:
        """The same, pruned: early layers over what is not cached, then late layers over what is kept of all of it."""
        early = prune.prune_layer + 1
        kept = kept_count(end, prune.keep_rate, prune.window)
        groups = [self._group(early, *span) for span in _spans(prefix, end, self.chunk)]
        groups += [self._group(self.shape.layers - early, *span) for span in _spans(0, kept, self.chunk)]
        return self._once + self.machine.prune + self._finish(groups)

    @property
    def _once(self) -> float:
        """What is paid once: the request itself, and reading the output matrix."""
        head = self.shape.vocabulary * self.shape.hidden * self.machine.itemsize
        return self.machine.request + head / self.machine.bandwidth

    def _group(self, layers: int, start: int, stop: int, graph: bool = False) -> Group:
        costs = GivenCosts(self.machine.constants(self.shape.layer(self.machine.itemsize)))
        launch = self.machine.graph_layer if graph else self.machine.eager_layer
        return Group(layers * launch, costs.seconds(span_work(layers, start, stop)._replace(eager=0)))

    def _finish(self, groups: Sequence[Group]) -> float:
        if not self.machine.overlaps:
            return sum(group.host + group.device for group in groups)
        return overlapped(groups)


def overlapped(groups: Sequence[Group]) -> float:
    """When the device is done with groups that the host launches one after the other, running ahead of it.

    The host launches all up to some group without a pause, and the device all from there on: whichever group makes
    that longest is where the device waited last.
    """
    longest, launched, left = 0.0, 0.0, sum(group.device for group in groups)
    for group in groups:
        longest = max(longest, launched + left)
        launched += group.host
        left -= group.device
    return max(longest, launched)


def _spans(start: int, end: int, chunk: int) -> Iterator[tuple[int, int]]:
    """[start, end) in parts of at most `chunk`."""
    for first in range(start, end, chunk):
        yield first, min(first + chunk, end)
