"""Shadow requests are counted with the labels of the requests that they follow."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, Counter

from claa_sglang.metrics.shadow import ShadowMetrics
from claa_sglang.shadow.agreement import Agreement

LABELS = {"model_name": "small", "tenant": ""}


def test_requests_and_tokens_are_counted_by_result() -> None:
    registry = CollectorRegistry()
    metrics = ShadowMetrics(SimpleNamespace(labels=LABELS, _counter_cls=partial(Counter, registry=registry)))
    metrics.count(LABELS, "greedy", "same", Agreement(5, 5, 5, -1.0))
    metrics.count(LABELS, "greedy", "different", Agreement(7, 4, 2, -3.0))
    metrics.count({**LABELS, "tenant": "x"}, "sampled", "dropped", None)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"sglang:claa_shadow_{name}_total", {**LABELS, **labels})

    assert value("requests", sampling="greedy", result="same") == 1
    assert value("requests", sampling="greedy", result="different") == 1
    assert value("requests", sampling="sampled", result="dropped", tenant="x") == 1
    assert (
        value("tokens", sampling="greedy", agrees="yes") == 9 and value("tokens", sampling="greedy", agrees="no") == 3
    )
    assert value("tokens", sampling="sampled", agrees="yes", tenant="x") is None
