"""The table of metrics keeps to what Prometheus and SGLang call theirs."""

from __future__ import annotations

import pytest

from claa_sglang.metrics.names import OF_REQUESTS, OF_SCHEDULERS, OF_SHADOWS, Metric

METRICS = (*OF_REQUESTS, *OF_SHADOWS, *OF_SCHEDULERS)


def test_every_metric_is_there_once() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_say_what_they_count(metric: Metric) -> None:
    assert metric.name.startswith("sglang:claa_")
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.text.endswith(".") and len(metric.text) <= 160
