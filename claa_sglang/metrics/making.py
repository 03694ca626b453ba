"""From rows of the table to metrics of prometheus_client, or of what stands in for it in SGLang."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from claa_sglang.metrics.names import Metric


def make(metric: Metric, collector: Any, **more: Any) -> Any:
    """The metric under its own labels and those of `collector`, one of SGLang's metrics collectors.

    Its classes of metrics are taken where it has any, as a server under Ray has. more: of the metric's class.
    """
    # As in SGLang, only here: the variable PROMETHEUS_MULTIPROC_DIR must be set before.
    import prometheus_client

    classes = {"counter": "Counter", "gauge": "Gauge", "histogram": "Histogram"}
    kind = getattr(collector, f"_{metric.kind}_cls") or getattr(prometheus_client, classes[metric.kind])
    if metric.kind == "gauge":
        more = {"multiprocess_mode": "mostrecent", **more}
    return kind(metric.name, metric.text, labelnames=[*collector.labels, *metric.labels], **more)


class Totals:
    """Counters that follow totals which somebody else counts.

    Args:
        metrics: whose names they are, none with labels of its own.
        collector: as for `make`; its labels are theirs.
    """

    def __init__(self, metrics: Iterable[Metric], collector: Any) -> None:
        self._counters = {metric: make(metric, collector).labels(**collector.labels) for metric in metrics}
        self._counted = dict.fromkeys(self._counters, 0.0)

    def reach(self, metric: Metric, total: float) -> None:
        """Count up to `total`. One that is below what was counted changes nothing."""
        if (more := total - self._counted[metric]) > 0:
            self._counters[metric].inc(more)
            self._counted[metric] = total
