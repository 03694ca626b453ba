"""CLAA in SGLang's /metrics, with `--enable-metrics`: what `claa_sglang/metrics/` counts, where SGLang counts its own.

A scheduler that exports metrics has a collector, and so has the server process. Numbers of a scheduler are written
whenever SGLang writes its own, and after each step of finishing, which SGLang does not see. Those of a request are
written when it ends, as its report is there then.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from claa_sglang.metrics.requests import RequestMetrics
from claa_sglang.metrics.scheduler import SchedulerMetrics
from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.policy import live_policy
from claa_sglang.patches.server_info import late_slots
from claa_sglang.requests.report import KEY
from claa_sglang.requests.state import FAILED

logger = logging.getLogger(__name__)


def export_scheduler(result: Any, self: Any) -> Any:
    """AFTER `SchedulerMetricsReporter.__post_init__`: a scheduler that exports metrics exports those of CLAA."""
    if self.current_scheduler_metrics_enabled:
        scheduler, pool = self.scheduler, self.scheduler.req_to_token_pool
        policy = live_policy(pool)
        exported = SchedulerMetrics(
            self.metrics_collector,
            lambda: late_slots(scheduler)["held"],
            attached.finishing.find(pool),
            attached.stages.of(pool),
            None if policy is None else policy.learned,
        )
        attached.metrics.hang(self.metrics_collector, exported)
    return result


def publish(result: Any, self: Any, _stats: Any = None) -> Any:
    """AFTER `SchedulerMetricsCollector.log_stats`, and after a step of finishing. self: the collector; None without."""
    if (metrics := attached.metrics.find(self)) is not None:
        metrics.publish()
    return result


def count_request(result: Any, self: Any, state: Any, recv_obj: Any, i: int) -> Any:
    """AFTER `TokenizerManager.collect_metrics`, which SGLang calls for each output of a request: once it ended."""
    reports = (getattr(recv_obj, "customized_info", None) or {}).get(KEY) if state.finished else None
    if not reports or not reports[i]:
        return result
    try:
        metrics = attached.metrics.find(self.metrics_collector)
        if metrics is None:
            buckets = self.server_args.bucket_time_to_first_token
            metrics = attached.metrics.hang(self.metrics_collector, RequestMetrics(self.metrics_collector, buckets))
        end = recv_obj.finished_reasons[i] or {}
        failed = end.get("type") == "abort" and str(end.get("message", "")).startswith(FAILED)
        ttft = state.time_stats.get_first_token_latency() if state.ttft_observed else None
        metrics.count(labels_of(self, state.obj), reports[i][0], ttft, failed)
    except Exception:  # a number is not worth an answer
        logger.exception("CLAA could not count request %s in /metrics", recv_obj.rids[i])
    return result


def labels_of(manager: Any, asked: Any) -> Mapping[str, str]:
    """The labels that SGLang gives its own metrics of this request."""
    labels = {**manager.metrics_collector.labels, **(getattr(asked, "custom_labels", None) or {})}
    priority = getattr(asked, "priority", None)
    return (
        {**labels, "priority": str(priority)} if manager.enable_priority_scheduling and priority is not None else labels
    )


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter.__post_init__",
        ("self",),
        "after",
        export_scheduler,
        "scheduler",
        "With --enable-metrics, late slots, finishing and the policy are exported beside SGLang's own metrics.",
    ),
    Hook(
        "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats",
        ("self", "stats"),
        "after",
        publish,
        "scheduler",
        "They are written whenever SGLang writes its own metrics.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.collect_metrics",
        ("self", "state", "recv_obj", "i"),
        "after",
        count_request,
        "server",
        "A request is counted where SGLang counts it, with the labels that SGLang gives it.",
    ),
)
