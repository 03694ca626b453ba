"""Metrics of requests, from the reports with which they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from claa_sglang.metrics import names
from claa_sglang.metrics.making import make
from claa_sglang.requests.dense_rules import name_of
from claa_sglang.requests.report import Report

# SGLang's own of its histogram, which it makes within a function.
TTFT_BUCKETS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)


def outcome(report: Report, failed: bool = False) -> tuple[str, str]:
    """What became of a request and what decided on it: labels of few values.

    failed: whether it ended with an error of CLAA's.
    """
    if failed or "error" in report:
        return "failed", "error"
    if report["pruned"]:
        return "pruned", "policy" if "policy" in report else "asked"
    if "policy" in report:
        return "dense", "policy"
    return "dense", "finished" if "finished_tokens" in report else name_of(report["reason"])


class RequestMetrics:
    """Of one server process.

    Args:
        collector: SGLang's `TokenizerMetricsCollector`, whose labels and classes of metrics are taken.
        ttft_buckets: upper bounds in seconds; None: SGLang's default.
    """

    def __init__(self, collector: Any, ttft_buckets: Sequence[float] | None = None) -> None:
        self._requests = make(names.REQUESTS, collector)
        self._prompt_tokens = make(names.PROMPT_TOKENS, collector)
        self._cached_tokens = make(names.CACHED_TOKENS, collector)
        self._ttft = make(names.TTFT, collector, buckets=ttft_buckets or TTFT_BUCKETS)

    def count(self, labels: Mapping[str, str], report: Report, ttft: float | None, failed: bool = False) -> None:
        """Count a request that ended.

        Args:
            labels: SGLang's of this request.
            report: the request's.
            ttft: seconds to its first token; None if it had none.
            failed: whether it ended with an error of CLAA's.
        """
        what, reason = outcome(report, failed)
        self._requests.labels(**labels, outcome=what, reason=reason).inc()
        if what == "failed":
            return
        if ttft is not None:
            self._ttft.labels(**labels, outcome=what).observe(ttft)
        cached, finished = report["early_cached_tokens"], report.get("finished_tokens", 0)
        if what == "pruned":
            kept = report["kept_tokens"]
            self._prompt_tokens.labels(**labels, part="kept").inc(kept)
            self._prompt_tokens.labels(**labels, part="dropped").inc(report["prompt_tokens"] - kept)
            self._cached_tokens.labels(**labels, namespace="pruned").inc(cached)
        else:
            # What was finished is in the dense namespace as well.
            finished = min(finished, cached)
            self._cached_tokens.labels(**labels, namespace="finished").inc(finished)
            self._cached_tokens.labels(**labels, namespace="dense").inc(cached - finished)
