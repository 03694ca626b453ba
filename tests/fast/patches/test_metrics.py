"""Finishing in /metrics: SGLang's own collector and reporter, hooked, and prometheus_client in several processes."""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter
from sglang.srt.observability.metrics_collector import (
    SchedulerMetricsCollector,
    SchedulerMetricsCollectorContext,
    SchedulerStats,
)
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.gauge_histogram import GaugeHistogram

from claa_sglang.finishing.finishing import Finishing
from claa_sglang.finishing.queue import Prefix
from claa_sglang.patches import attached, hooks, metrics

LABELS = {"model_name": "small", "engine_type": "unified", "tp_rank": 0, "pp_rank": 0, "moe_ep_rank": 0}
NAMES = {"prefixes_waiting", "prefixes_total", "dropped_total", "tokens_total", "seconds_total"}


@pytest.fixture(scope="module", autouse=True)
def hooked() -> Iterator[None]:
    """SGLang's two classes with our hooks, until the module's end."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((SchedulerMetricsReporter, "__post_init__"), (SchedulerMetricsCollector, "log_stats")):
            patch.setattr(owner, name, getattr(owner, name))
        patch.setattr(HookRegistry, "_hooks", dict(HookRegistry._hooks))
        patch.setattr(HookRegistry, "_patched", set(HookRegistry._patched))
        patch.setattr(hooks, "_applied", {})
        assert len(hooks.apply("scheduler", metrics.HOOKS)) == 2
        yield


class Scheduler:
    """What a scheduler makes for its metrics, in a registry of its own."""

    def __init__(self, exports: bool = True, finishes: bool = True) -> None:
        self.registry, self.finishing = CollectorRegistry(), Finishing()
        pool = SimpleNamespace()
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
    metrics.publish_finishing(None, scheduler.collector)  # after a step
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
def test_nothing_is_exported_without_metrics_or_without_finishing(switches: dict[str, bool]) -> None:
    scheduler = Scheduler(**switches)
    if scheduler.collector is not None:
        scheduler.collector.log_stats(SchedulerStats())
    metrics.publish_finishing(None, scheduler.collector)
    assert set(scheduler.values().values()) == {None}


PROCESS = """
import sys
from types import SimpleNamespace
assert "prometheus_client" not in sys.modules
from claa_sglang.finishing.finishing import Finishing
from claa_sglang.patches.metrics import FinishMetrics
assert "prometheus_client" not in sys.modules
rank = int(sys.argv[1])
labels = {"model_name": "small", "dp_rank": rank}
finishing = Finishing()
metrics = FinishMetrics(SimpleNamespace(labels=labels, _counter_cls=None, _gauge_cls=None), finishing)
finishing.tokens = 100 + rank
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
