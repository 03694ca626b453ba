"""docs/dashboards/claa.json: a Grafana dashboard of the metrics, to load beside SGLang's own."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 12, 8  # of a panel; Grafana's grid is 24 wide


class Panel(NamedTuple):
    """One graph. queries: PromQL over five minutes. legends: one for each, with `{{label}}`. unit: Grafana's."""

    title: str
    queries: tuple[str, ...]
    legends: tuple[str, ...]
    unit: str = "short"


def _metric(name: str, **labels: str) -> str:
    """A selector of sglang:claa_`name`, or sglang_claa_`name` as Prometheus before version 3 gets it."""
    wanted = [f'__name__=~"sglang.claa_{name}"', *(f'{label}="{value}"' for label, value in labels.items())]
    return "{" + ",".join(wanted) + "}"


def _median(outcome: str) -> str:
    buckets = _metric("time_to_first_token_seconds_bucket", outcome=outcome)
    return f"histogram_quantile(0.5, sum by (le) (rate({buckets}[5m])))"


def _rate(by: str, metric: str) -> str:
    return f"sum by ({by}) (rate({metric}[5m]))"


def _ratio(part: str, whole: str) -> str:
    return f"sum(rate({part}[5m])) / sum(rate({whole}[5m]))"


def _agreement(sampling: str) -> str:
    compared = _metric("shadow_tokens_total", sampling=sampling)
    return _ratio(_metric("shadow_tokens_total", sampling=sampling, agrees="yes"), compared)


_REQUESTS, _TOKENS = _metric("requests_total"), _metric("prompt_tokens_total")
PANELS = (
    Panel(
        "Requests by outcome and reason",
        (_rate("outcome, reason", _REQUESTS),),
        ("{{outcome}}: {{reason}}",),
        "reqps",
    ),
    Panel(
        "Share of requests that failed",
        (_ratio(_metric("requests_total", outcome="failed"), _REQUESTS),),
        ("failed",),
        "percentunit",
    ),
    Panel("Median time to the first token", (_median("pruned"), _median("dense")), ("pruned", "dense"), "s"),
    Panel(
        "Share of pruned prompts that is kept",
        (_ratio(_metric("prompt_tokens_total", part="kept"), _TOKENS),),
        ("kept",),
        "percentunit",
    ),
    Panel(
        "Prompt tokens from the prefix cache",
        (_rate("namespace", _metric("cached_tokens_total")),),
        ("{{namespace}}",),
    ),
    Panel("Late KV slots held", (f"sum by (dp_rank) ({_metric('late_slots_held')})",), ("replica {{dp_rank}}",)),
    Panel(
        "Prefixes finished while idle",
        (
            f"sum({_metric('finish_prefixes_waiting')})",
            f"sum(increase({_metric('finish_prefixes_total')}[5m]))",
        ),
        ("waiting", "finished in 5 minutes"),
    ),
    Panel(
        "Time of the device in CLAA's own stages",
        tuple(f"sum(rate({_metric(f'{stage}_seconds_total')}[5m]))" for stage in ("score", "prune")),
        ("scoring", "ranking and moving rows"),
        "percentunit",
    ),
    Panel(
        "Time of prefill steps against what the policy expected",
        (_ratio(_metric("policy_measured_seconds_total"), _metric("policy_expected_seconds_total")),),
        ("measured / expected",),
        "percentunit",
    ),
    Panel(
        "Share of answer tokens that the dense model agrees with",
        (_agreement("greedy"), _agreement("sampled")),
        ("greedy", "sampled"),
        "percentunit",
    ),
    Panel("Shadow requests by result", (_rate("result", _metric("shadow_requests_total")),), ("{{result}}",), "reqps"),
)


def dashboard() -> dict[str, Any]:
    """Grafana's model of it."""
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return {
        "title": "SGLang: CLAA",
        "uid": "sglang-claa",
        "tags": ["sglang", "claa"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [source]},
        "panels": [_panel(index, panel) for index, panel in enumerate(PANELS)],
    }


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + n), "datasource": SOURCE, "expr": query, "legendFormat": legend}
        for n, (query, legend) in enumerate(zip(panel.queries, panel.legends, strict=True))
    ]
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "gridPos": {"w": WIDTH, "h": HEIGHT, "x": index % 2 * WIDTH, "y": index // 2 * HEIGHT},
    }


def text() -> str:
    """The file, with a newline at its end."""
    return json.dumps(dashboard(), indent=1) + "\n"
