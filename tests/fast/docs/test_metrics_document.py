"""docs/metrics.md and the dashboard are the tables of metrics and of panels, and ask for metrics that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from claa_sglang.metrics.names import OF_REQUESTS, OF_SCHEDULERS, OF_SHADOWS
from docs.generate import dashboard, metrics

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_document_is_the_tables() -> None:
    assert (DOCS / "metrics.md").read_text() == metrics.markdown(), "run: python -m docs.generate"


def test_the_dashboard_is_the_panels() -> None:
    assert (DOCS / "dashboards" / "claa.json").read_text() == dashboard.text(), "run: python -m docs.generate"
    shown = [target["expr"] for panel in json.loads(dashboard.text())["panels"] for target in panel["targets"]]
    assert shown == [query for panel in dashboard.PANELS for query in panel.queries]


def test_queries_ask_for_metrics_that_are_there_and_show_each() -> None:
    known = {metric.name for metric in (*OF_REQUESTS, *OF_SHADOWS, *OF_SCHEDULERS)}
    asked = {
        name.removesuffix("_bucket").replace(".", ":")
        for panel in dashboard.PANELS
        for query in panel.queries
        for name in re.findall(r"sglang\.\w+", query)
    }
    more = ("policy_steps", "finish_dropped", "finish_tokens", "finish_seconds")
    unshown = {f"sglang:claa_{name}_total" for name in more}
    assert asked == known - unshown
