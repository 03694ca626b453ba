"""Metrics of shadow requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claa_sglang.metrics import names
from claa_sglang.metrics.making import make
from claa_sglang.shadow.agreement import Agreement


class ShadowMetrics:
    """Of one server process.

    Args:
        collector: SGLang's `TokenizerMetricsCollector`, whose labels and classes of metrics are taken.
    """

    def __init__(self, collector: Any) -> None:
        self._requests = make(names.SHADOWS, collector)
        self._tokens = make(names.SHADOW_TOKENS, collector)

    def count(self, labels: Mapping[str, str], kind: str, result: str, found: Agreement | None) -> None:
        """Count one.

        Args:
            labels: SGLang's of the pruned request.
            kind: greedy or sampled.
            result: of `claa_sglang.shadow.counts.RESULTS`.
            found: what was compared; None where nothing was.
        """
        self._requests.labels(**labels, sampling=kind, result=result).inc()
        if found is not None:
            self._tokens.labels(**labels, sampling=kind, agrees="yes").inc(found.agreeing)
            self._tokens.labels(**labels, sampling=kind, agrees="no").inc(found.tokens - found.agreeing)
