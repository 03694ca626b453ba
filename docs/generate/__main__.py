"""`python -m docs.generate` writes the documents that are made from tables."""

from __future__ import annotations

from pathlib import Path

from docs.generate import combinations, dashboard, hooks, metrics

DOCS = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    (DOCS / "combinations.md").write_text(combinations.markdown())
    (DOCS / "hooks.md").write_text(hooks.markdown())
    (DOCS / "metrics.md").write_text(metrics.markdown())
    (DOCS / "dashboards" / "claa.json").write_text(dashboard.text())
