"""Metrics of one scheduler: late slots, finishing, seconds of CLAA's own stages, and what the policy expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from claa_sglang.finishing.finishing import Finishing
from claa_sglang.forward.stage_times import PRUNE, SCORE, StageTimes
from claa_sglang.metrics import names
from claa_sglang.metrics.making import Totals, make
from claa_sglang.policy.cost import CostModel

# Of `Finishing.stats`.
_FINISHING = {
    "finished": names.FINISHED,
    "dropped": names.DROPPED,
    "tokens": names.FINISH_TOKENS,
    "seconds": names.FINISH_SECONDS,
}

_STAGES = {SCORE: names.SCORE_SECONDS, PRUNE: names.PRUNE_SECONDS}


class SchedulerMetrics:
    """What one scheduler exports.

    Args:
        collector: SGLang's `SchedulerMetricsCollector`, whose labels and classes of metrics are taken.
        held: late slots that requests hold now.
        finishing: whose numbers they are; None where nothing is finished.
        stages: whose seconds they are.
        cost: the policy's model; None without a policy.
    """

    def __init__(
        self,
        collector: Any,
        held: Callable[[], int],
        finishing: Finishing | None,
        stages: StageTimes,
        cost: CostModel | None,
    ) -> None:
        def gauge(metric: names.Metric) -> Any:
            return make(metric, collector).labels(**collector.labels)

        self._held, self._finishing, self._stages, self._cost = held, finishing, stages, cost
        self._late_slots = gauge(names.LATE_SLOTS)
        self._waiting = None if finishing is None else gauge(names.WAITING)
        counters = [*_STAGES.values(), *([] if finishing is None else _FINISHING.values())]
        counters += [] if cost is None else [names.POLICY_STEPS, names.POLICY_EXPECTED, names.POLICY_MEASURED]
        self._totals = Totals(counters, collector)

    def publish(self) -> None:
        """Write the numbers of now."""
        self._late_slots.set(self._held())
        if self._finishing is not None and self._waiting is not None:
            stats = self._finishing.stats()
            self._waiting.set(stats["waiting"])
            for stat, metric in _FINISHING.items():
                self._totals.reach(metric, stats[stat])
        self._stages.collect()
        for stage, metric in _STAGES.items():
            self._totals.reach(metric, self._stages.seconds[stage])
        if self._cost is not None:
            self._totals.reach(names.POLICY_STEPS, self._cost.steps)
            self._totals.reach(names.POLICY_EXPECTED, self._cost.expected_seconds)
            self._totals.reach(names.POLICY_MEASURED, self._cost.measured_seconds)
