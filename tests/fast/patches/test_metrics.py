"""CLAA in /metrics: SGLang's own collectors, reporter and tokenizer manager, hooked, and prometheus_client in several
processes."""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.observability.metrics_collector import (
    SchedulerMetricsCollector,
    SchedulerMetricsCollectorContext,
    SchedulerStats,
    TokenizerMetricsCollector,
)
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.gauge_histogram import GaugeHistogram

from claa_sglang.arguments import ClaaServerArgs
from claa_sglang.finishing.finishing import Finishing
from claa_sglang.finishing.queue import Prefix
from claa_sglang.forward.stage_times import StageTimes
from claa_sglang.patches import attached, hooks, metrics
from claa_sglang.requests.report import KEY, build_report
from claa_sglang.requests.state import FAILED
from tests.fast.states import pruned

LABELS = {"model_name": "small", "engine_type": "unified", "tp_rank": 0, "pp_rank": 0, "moe_ep_rank": 0}
NAMES = {"prefixes_waiting", "prefixes_total", "dropped_total", "tokens_total", "seconds_total"}


@pytest.fixture(scope="module", autouse=True)
def hooked() -> Iterator[None]:
    """SGLang's classes with our hooks, until the module's end."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (SchedulerMetricsReporter, "__post_init__"),
            (SchedulerMetricsCollector, "log_stats"),
            (TokenizerManager, "collect_metrics"),
        ):
            patch.setattr(owner, name, getattr(owner, name))
        patch.setattr(HookRegistry, "_hooks", dict(HookRegistry._hooks))
        patch.setattr(HookRegistry, "_patched", set(HookRegistry._patched))
        patch.setattr(hooks, "_applied", {})
        assert len(hooks.apply("scheduler", metrics.HOOKS)) == 2
        assert len(hooks.apply("server", metrics.HOOKS)) == 1
        yield


class Scheduler:
    """What a scheduler makes for its metrics, in a registry of its own."""

    def __init__(self, exports: bool = True, finishes: bool = True) -> None:
        self.registry, self.finishing = CollectorRegistry(), Finishing()
        pool = SimpleNamespace()
        self.stages = attached.stages.hang(pool, StageTimes())
        if finishes:
            attached.finishing.hang(pool, self.finishing)
        kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram, "summary": Summary}
        own = {f"_{name}_cls": partial(kind, registry=self.registry) for name, kind in kinds.items()}
        args = ServerArgs(model_path="x", enable_metrics=exports)
        ranks = {"attn_dp_rank": 0, "attn_tp_rank": 0, "attn_cp_rank": 0, "pp_rank": 0, "pp_size": 1}
        with get_context().override_server_args(), get_parallel().override(**ranks):
            self.collector = type("Own", (SchedulerMetricsCollector,), own)(LABELS, args) if exports else None
            context = SchedulerMetricsCollectorContext(
                enable_metrics=exports,
                is_stats_logging_rank=True,
                current_scheduler_metrics_enabled=exports,
                enable_kv_cache_events=False,
                collector=self.collector,
            )
            for metric in vars(self.collector).values() if exports else ():
                if isinstance(metric, GaugeHistogram):  # of all metrics, only these know no other registry
                    REGISTRY.unregister(metric._gauge)
            SchedulerMetricsReporter(
                scheduler=SimpleNamespace(req_to_token_pool=pool),
                metrics_collector_context=context,
                metrics_collector=self.collector,
            )

    def values(self) -> dict[str, float | None]:
        """By the end of their names."""
        return {
            name: self.registry.get_sample_value(f"sglang:claa_finish_{name}", {k: str(v) for k, v in LABELS.items()})
            for name in NAMES
        }


def test_a_metric_follows_each_number_of_finishing() -> None:
    scheduler = Scheduler()
    assert scheduler.values() == dict.fromkeys(NAMES, 0)  # they are there from the start
    finishing = scheduler.finishing
    for round_ in (1, 2):
        finishing.queue.add(Prefix(array("q", [round_] * 600), ("claa:x", None)))
        finishing.prefixes += 3
        finishing.queue.dropped += 2
        finishing.tokens += 700
        finishing.seconds += 0.25
        scheduler.collector.log_stats(SchedulerStats())
        expected = {"prefixes_waiting": 1, "prefixes_total": 3, "dropped_total": 2, "tokens_total": 700}
        expected |= {"seconds_total": 0.25}
        assert scheduler.values() == {name: round_ * value for name, value in expected.items()}
    finishing.clear()
    metrics.publish(None, scheduler.collector)  # after a step
    assert scheduler.values()["prefixes_waiting"] == 0 and scheduler.values()["prefixes_total"] == 6


def test_their_text_is_prometheus_s_with_sglang_s_labels() -> None:
    text = generate_latest(Scheduler().registry).decode()
    assert "# TYPE sglang:num_running_reqs gauge\n" in text  # beside SGLang's
    labels = ",".join(f'{name}="{value}"' for name, value in sorted(LABELS.items()))
    for name in NAMES:
        assert f"sglang:claa_finish_{name}{{{labels}}} 0.0\n" in text
        kind = "gauge" if name == "prefixes_waiting" else "counter"
        assert f"# TYPE sglang:claa_finish_{name} {kind}\n" in text and f"# HELP sglang:claa_finish_{name} " in text


@pytest.mark.parametrize("switches", [{"exports": False}, {"finishes": False}])
def test_nothing_is_exported_without_metrics_and_nothing_of_finishing_without_it(switches: dict[str, bool]) -> None:
    scheduler = Scheduler(**switches)
    if scheduler.collector is not None:
        scheduler.collector.log_stats(SchedulerStats())
    metrics.publish(None, scheduler.collector)
    assert set(scheduler.values().values()) == {None}


class Manager:
    """SGLang's tokenizer manager as far as it counts, with a registry of its own."""

    def __init__(self, claa: bool = True) -> None:
        self.registry = CollectorRegistry()
        kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        own = {f"_{name}_cls": partial(kind, registry=self.registry) for name, kind in kinds.items()}
        with get_context().override_server_args():
            collector = type("Own", (TokenizerMetricsCollector,), own)(labels={"model_name": "small"})
        made = object.__new__(TokenizerManager)
        made.metrics_collector, made.enable_priority_scheduling = collector, False
        made.disaggregation_mode, made.server_args = (
            DisaggregationMode.NULL,
            ClaaServerArgs(model_path="x", enable_claa=claa),
        )
        self.count = made.collect_metrics

    def counted(self, outcome: str, reason: str) -> float | None:
        labels = {"model_name": "small", "outcome": outcome, "reason": reason}
        return self.registry.get_sample_value("sglang:claa_requests_total", labels)

    def sglang_s(self) -> float | None:
        labels = {"model_name": "small", "is_streaming": "true"}
        return self.registry.get_sample_value("sglang:num_requests_total", labels)


class Stats:
    """Of a request whose first token came after two seconds."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 2.0


def outputs(end: dict[str, str] | None, report: Any) -> tuple[Any, Any]:
    """SGLang's state of a streamed request, and its output: the last one if it has an end."""
    asked = SimpleNamespace(stream=True, sampling_params={})
    state = SimpleNamespace(obj=asked, finished=end is not None, ttft_observed=False, time_stats=Stats())
    counts = {"completion_tokens": [3], "prompt_tokens": [100], "cached_tokens": [0]}
    info = {KEY: [[report] if report else []]}
    return state, SimpleNamespace(finished_reasons=[end], customized_info=info, rids=["r"], **counts)


def test_a_request_is_counted_once_when_it_ended() -> None:
    manager, report = Manager(), build_report(pruned(100), 0)
    state, chunk = outputs(None, None)
    manager.count(state, chunk, 0)
    assert manager.counted("pruned", "asked") is None
    state.finished, last = True, outputs({"type": "length"}, report)[1]
    manager.count(state, last, 0)
    assert manager.counted("pruned", "asked") == manager.sglang_s() == 1
    seconds = {"model_name": "small", "outcome": "pruned"}
    assert manager.registry.get_sample_value("sglang:claa_time_to_first_token_seconds_sum", seconds) == 2.0


def test_a_request_that_claa_ended_is_counted_as_failed() -> None:
    manager, report = Manager(), build_report(pruned(100), 0)
    for message in (f"{FAILED} scoring: ValueError: x", "the client hung up"):
        manager.count(*outputs({"type": "abort", "message": message}, report), 0)
    assert manager.counted("failed", "error") == manager.counted("pruned", "asked") == 1


def test_a_request_without_a_report_or_with_a_strange_one_is_sglang_s_alone(caplog: pytest.LogCaptureFixture) -> None:
    manager = Manager(claa=False)
    manager.count(*outputs({"type": "length"}, build_report(pruned(100), 0)), 0)
    assert manager.sglang_s() == 1 and manager.counted("pruned", "asked") is None
    manager = Manager()
    manager.count(*outputs({"type": "length"}, None), 0)
    assert not caplog.records
    manager.count(*outputs({"type": "length"}, {"pruned": True}), 0)
    assert manager.sglang_s() == 2 and "could not count request r" in caplog.text


PROCESS = """
import sys
from types import SimpleNamespace
assert "prometheus_client" not in sys.modules
from claa_sglang.finishing.finishing import Finishing
from claa_sglang.forward.stage_times import SCORE, StageTimes
from claa_sglang.metrics.scheduler import SchedulerMetrics
assert "prometheus_client" not in sys.modules
rank = int(sys.argv[1])
labels = {"model_name": "small", "dp_rank": rank}
finishing = Finishing()
collector = SimpleNamespace(labels=labels, _counter_cls=None, _gauge_cls=None)
stages = StageTimes()
metrics = SchedulerMetrics(collector, lambda: 7 + rank, finishing, stages, None)
finishing.tokens = 100 + rank
stages.seconds[SCORE] = 0.5 + rank
metrics.publish()
"""
SERVER = """
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_a_server_shows_what_its_schedulers_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in SGLang: each process writes files, and the server reads them."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for rank in ("0", "1"):
        subprocess.run([sys.executable, "-c", PROCESS, rank], check=True)
    text = subprocess.run([sys.executable, "-c", SERVER], check=True, capture_output=True, text=True).stdout
    for rank in (0, 1):
        assert f'sglang:claa_finish_tokens_total{{dp_rank="{rank}",model_name="small"}} 10{rank}.0' in text
        assert f'sglang:claa_finish_prefixes_waiting{{dp_rank="{rank}",model_name="small"}} 0.0' in text
        assert f'sglang:claa_score_seconds_total{{dp_rank="{rank}",model_name="small"}} {rank}.5' in text
        assert f'sglang:claa_late_slots_held{{dp_rank="{rank}",model_name="small"}} {7 + rank}.0' in text
