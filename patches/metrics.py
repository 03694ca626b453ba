"""Finishing in SGLang's /metrics, with `--enable-metrics`: beside its own scheduler metrics, under its own labels.

A scheduler that exports metrics has a collector. What finishing did is written there whenever SGLang writes its own,
and after each step of finishing, which SGLang does not see.
"""

from __future__ import annotations

from typing import Any

from claa_sglang.finishing.finishing import Finishing
from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook

WAITING = ("waiting", "sglang:claa_finish_prefixes_waiting", "The number of pruned prefixes that wait to be finished.")
# Of `Finishing.stats`: name there, metric, what it counts.
COUNTERS = (
    (
        "finished",
        "sglang:claa_finish_prefixes_total",
        "Pruned prefixes that were made dense while the server was idle.",
    ),
    ("dropped", "sglang:claa_finish_dropped_total", "Pruned prefixes that were given up: no room, or an error."),
    ("tokens", "sglang:claa_finish_tokens_total", "Tokens of pruned prefixes that were made dense."),
    ("seconds", "sglang:claa_finish_seconds_total", "Seconds that finishing pruned prefixes took."),
)


class FinishMetrics:
    """What one scheduler exports of its finishing.

    Args:
        collector: SGLang's `SchedulerMetricsCollector`, whose labels and classes of metrics are taken.
        finishing: whose numbers they are.
    """

    def __init__(self, collector: Any, finishing: Finishing) -> None:
        # As in SGLang, only here: the variable PROMETHEUS_MULTIPROC_DIR must be set before.
        from prometheus_client import Counter, Gauge

        labels = collector.labels
        counter, gauge = collector._counter_cls or Counter, collector._gauge_cls or Gauge
        self._finishing = finishing
        self._waiting = gauge(*WAITING[1:], labelnames=labels.keys(), multiprocess_mode="mostrecent").labels(**labels)
        self._counters = {
            stat: counter(name, text, labelnames=labels.keys()).labels(**labels) for stat, name, text in COUNTERS
        }
        self._counted = dict.fromkeys(self._counters, 0.0)

    def publish(self) -> None:
        """Write the numbers of now."""
        stats = self._finishing.stats()
        self._waiting.set(stats[WAITING[0]])
        for stat, counter in self._counters.items():
            counter.inc(stats[stat] - self._counted[stat])
            self._counted[stat] = stats[stat]


def export_finishing(result: Any, self: Any) -> Any:
    """AFTER `SchedulerMetricsReporter.__post_init__`: a scheduler that exports metrics exports those of finishing."""
    finishing = attached.finishing.find(self.scheduler.req_to_token_pool)
    if finishing is not None and self.current_scheduler_metrics_enabled:
        attached.metrics.hang(self.metrics_collector, FinishMetrics(self.metrics_collector, finishing))
    return result


def publish_finishing(result: Any, self: Any, _stats: Any = None) -> Any:
    """AFTER `SchedulerMetricsCollector.log_stats`, and after a step of finishing. self: the collector; None without."""
    if (metrics := attached.metrics.find(self)) is not None:
        metrics.publish()
    return result


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter.__post_init__",
        ("self",),
        "after",
        export_finishing,
        "scheduler",
        "With --enable-metrics, what finishing does is exported beside SGLang's own metrics of a scheduler.",
    ),
    Hook(
        "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats",
        ("self", "stats"),
        "after",
        publish_finishing,
        "scheduler",
        "Prefixes that wait are counted whenever SGLang writes its own metrics.",
    ),
)
