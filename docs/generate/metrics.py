"""docs/metrics.md: every metric, as a document made from the table in `claa_sglang/metrics/names.py`."""

from __future__ import annotations

from collections.abc import Iterable

from claa_sglang.metrics.names import OF_REQUESTS, OF_SCHEDULERS, OF_SHADOWS, Metric
from claa_sglang.requests.dense_rules import LATER, OTHER, RULES
from docs.generate.dashboard import PANELS

_TOP = """# Metrics

What is pruning doing now? With SGLang's `--enable-metrics`, `/metrics` has these beside SGLang's own.
Made from the table in `claa_sglang/metrics/names.py` by `python -m docs.generate`.

```bash serves
python -m sglang.launch_server --model-path .cache/models/smollm2-135m-instruct --device cpu --dtype float32 \\
    --attention-backend torch_native --max-total-tokens 20000 --enable-claa --enable-metrics
```

```bash server
curl -s http://127.0.0.1:30000/metrics
```

A panel of the [dashboard](#queries)'s in Prometheus: such a server, under requests that are pruned and that opt out.

![Requests per second by outcome and reason, over four minutes](images/metrics.png)
"""
_REQUESTS = """## Requests

Each is written once, when the request ends, by the process that answered the client.
They have the labels of SGLang's own metrics of requests, and those of the table.
"""
_SHADOWS = """## Shadow requests

With `--claa-shadow-rate`, each is written when a shadow request is over, by the same process and with the labels of the
request that was drawn. [shadow.md](shadow.md) says what they mean.
"""
_SCHEDULERS = """## Schedulers

They have the labels of SGLang's own metrics of a scheduler, `dp_rank` among them.
Of the ranks of one replica, one writes them, as of SGLang's own.
A scheduler writes with its prefill steps, every `--decode-log-interval` steps of decoding, and every 30 seconds at
rest, as SGLang does.
Those of finishing are there unless `--claa-finish off` is given, those of the policy where it measures the machine.
"""
_REASONS = """## Reasons

`outcome` is `pruned`, `dense` or `failed`. A failed request ended with an error of the plugin's; a request that its
client aborted before its first token is in no metric.

| outcome | reason | what decided |
|---|---|---|
| `pruned` | `asked` | `--claa-policy always`, or the request |
| `pruned`, `dense` | `policy` | `--claa-policy auto`, by what it expects each way to take |
| `dense` | `finished` | its prefix was made dense while the server was idle |
"""
_QUERIES = """## Queries

[`docs/dashboards/claa.json`](dashboards/claa.json) is a Grafana dashboard of these queries. It loads beside
SGLang's own (Dashboards, New, Import), and has a variable for the data source.
Prometheus before version 3 gets these names with `_` in place of `:`, as it does SGLang's own; the queries take both.

| panel | query |
|---|---|
"""


def markdown() -> str:
    """The document, with a newline at its end."""
    reasons = [(rule.name, rule.asks) for rule in RULES]
    reasons += [(name, reason.format(need="N", capacity="M")) for name, reason in LATER]
    rows = [f"| `dense` | `{name}` | {why} |" for name, why in (*reasons, (OTHER, "anything else"))]
    queries = [f"| {panel.title} | {'<br>'.join(f'`{query}`' for query in panel.queries)} |" for panel in PANELS]
    parts = ((_REQUESTS, OF_REQUESTS), (_SHADOWS, OF_SHADOWS), (_SCHEDULERS, OF_SCHEDULERS))
    metrics = [line for text, rows in parts for line in (text, *_table(rows), "")]
    return "\n".join([_TOP, *metrics, _REASONS.rstrip(), *rows, "", _QUERIES.rstrip(), *queries]) + "\n"


def _table(metrics: Iterable[Metric]) -> list[str]:
    rows = ["| metric | kind | labels | what |", "|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.text} |")
    return rows
