"""Requests are counted by what became of them, from the reports that clients get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram

from claa_sglang.config.config import ClaaConfig
from claa_sglang.metrics.requests import RequestMetrics, outcome
from claa_sglang.requests.dense_rules import LATER, OTHER, RULES, name_of
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.report import Report, build_report
from claa_sglang.requests.state import RequestState
from tests.fast.states import CONFIG

LABELS = {"model_name": "small"}


class Exported:
    """Metrics of requests in a registry of their own."""

    def __init__(self, **more: Any) -> None:
        self._registry = CollectorRegistry()
        kinds = {"counter": Counter, "histogram": Histogram}
        own = {f"_{name}_cls": self._made(kind) for name, kind in kinds.items()}
        self.metrics = RequestMetrics(SimpleNamespace(labels=LABELS, **own), **more)

    def _made(self, kind: Any) -> Any:
        return lambda *args, **more: kind(*args, registry=self._registry, **more)

    def value(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"sglang:claa_{name}", {**LABELS, **labels})


def dense(reason: str, cached: int = 0) -> Report:
    return build_report(RequestState.dense_request(RequestOptions(), 100, reason), cached)


def pruned(cached: int = 0, config: ClaaConfig = CONFIG) -> Report:
    return build_report(RequestState.pruned_request(RequestOptions(), config, 100), cached)


@given(st.sampled_from([*((rule.name, rule.reason) for rule in RULES), *LATER]), st.integers(0, 10**7))
def test_every_reason_has_the_name_of_its_rule_whatever_its_numbers(rule: tuple[str, str], number: int) -> None:
    name, reason = rule
    values = dict.fromkeys(("min_prompt_tokens", "window", "need", "capacity"), number)
    assert name_of(reason.format_map(values)) == name
    assert name_of(reason.format_map(values) + " more") == OTHER


def test_names_of_rules_are_labels_and_differ() -> None:
    names = [rule.name for rule in RULES] + [name for name, _ in LATER]
    assert len(set(names)) == len(names) and OTHER not in names
    assert all(name.replace("_", "").isalpha() and name.islower() for name in names)


@pytest.mark.parametrize(
    ("report", "failed", "expected"),
    [
        (pruned(), False, ("pruned", "asked")),
        ({**pruned(), "policy": "auto"}, False, ("pruned", "policy")),
        (pruned(), True, ("failed", "error")),
        ({"error": "ValueError: x"}, False, ("failed", "error")),
        (dense("disabled by request"), False, ("dense", "opted_out")),
        ({**dense("dense is faster: 1 ms"), "policy": "auto"}, False, ("dense", "policy")),
        ({**dense("its prefix was finished"), "finished_tokens": 9}, False, ("dense", "finished")),
        (dense("a reason that no rule has"), False, ("dense", "other")),
    ],
)
def test_what_became_of_a_request(report: Report, failed: bool, expected: tuple[str, str]) -> None:
    assert outcome(report, failed) == expected


def test_pruned_and_dense_requests_are_counted_apart() -> None:
    exported = Exported(ttft_buckets=[0.5, 2])
    report = pruned(cached=40)
    exported.metrics.count(LABELS, report, ttft=0.4)
    exported.metrics.count(LABELS, report, ttft=1.0)
    exported.metrics.count(LABELS, {**dense("disabled by request", cached=60), "finished_tokens": 50}, ttft=3.0)
    assert exported.value("requests_total", outcome="pruned", reason="asked") == 2
    assert exported.value("requests_total", outcome="dense", reason="finished") == 1
    assert exported.value("prompt_tokens_total", part="kept") == 2 * report["kept_tokens"]
    assert exported.value("prompt_tokens_total", part="dropped") == 2 * (100 - report["kept_tokens"])
    cached = {name: exported.value("cached_tokens_total", namespace=name) for name in ("pruned", "dense", "finished")}
    assert cached == {"pruned": 80, "dense": 10, "finished": 50}
    bucket = "time_to_first_token_seconds_bucket"
    assert exported.value(bucket, outcome="pruned", le="0.5") == 1
    assert exported.value(bucket, outcome="pruned", le="2.0") == 2
    assert exported.value("time_to_first_token_seconds_sum", outcome="dense") == 3.0


def test_a_request_that_failed_is_counted_and_nothing_of_it_is() -> None:
    exported = Exported()
    exported.metrics.count(LABELS, pruned(), ttft=None, failed=True)
    exported.metrics.count(LABELS, {"error": "ValueError: x"}, ttft=1.0)
    assert exported.value("requests_total", outcome="failed", reason="error") == 2
    assert exported.value("prompt_tokens_total", part="kept") is None
    assert exported.value("time_to_first_token_seconds_count", outcome="failed") is None


def test_a_request_without_a_first_token_has_no_time_to_it() -> None:
    exported = Exported()
    exported.metrics.count(LABELS, pruned(), ttft=None)
    assert exported.value("requests_total", outcome="pruned", reason="asked") == 1
    assert exported.value("time_to_first_token_seconds_count", outcome="pruned") is None
