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


def _median(outcome: str) -> str:
    buckets = f'sglang:claa_time_to_first_token_seconds_bucket{{outcome="{outcome}"}}'
    return f"histogram_quantile(0.5, sum by (le) (rate({buckets}[5m])))"


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[5m]))"


def _ratio(part: str, whole: str) -> str:
    return f"sum(rate({part}[5m])) / sum(rate({whole}[5m]))"


_REQUESTS, _TOKENS = "sglang:claa_requests_total", "sglang:claa_prompt_tokens_total"
_CACHED = "sglang:claa_cached_tokens_total"
PANELS = (
    Panel(
        "Requests by outcome and reason",
        (_rate(_REQUESTS, "outcome, reason"),),
        ("{{outcome}}: {{reason}}",),
        "reqps",
    ),
    Panel(
        "Share of requests that failed",
        (_ratio(f'{_REQUESTS}{{outcome="failed"}}', _REQUESTS),),
        ("failed",),
        "percentunit",
    ),
    Panel("Median time to the first token", (_median("pruned"), _median("dense")), ("pruned", "dense"), "s"),
    Panel(
        "Share of pruned prompts that is kept",
        (_ratio(f'{_TOKENS}{{part="kept"}}', _TOKENS),),
        ("kept",),
        "percentunit",
    ),
    Panel("Prompt tokens from the prefix cache", (_rate(_CACHED, "namespace"),), ("{{namespace}}",)),
    Panel("Late KV slots held", ("sum by (dp_rank) (sglang:claa_late_slots_held)",), ("replica {{dp_rank}}",)),
    Panel(
        "Prefixes finished while idle",
        ("sum(sglang:claa_finish_prefixes_waiting)", "sum(rate(sglang:claa_finish_prefixes_total[5m])) * 300"),
        ("waiting", "finished in 5 minutes"),
    ),
    Panel(
        "Time of prefill steps against what the policy expected",
        (_ratio("sglang:claa_policy_measured_seconds_total", "sglang:claa_policy_expected_seconds_total"),),
        ("measured / expected",),
        "percentunit",
    ),
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
