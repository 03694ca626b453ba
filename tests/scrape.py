"""What a test server exports on /metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client.parser import text_string_to_metric_families

from tests.engine_server import Server

Values = Counter[tuple[str, ...]]


def scrape(server: Server, name: str, *labels: str) -> Values:
    """Values of the metric `name`, summed over all its labels but those that are named, by their values."""
    found: Values = Counter()
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                found[tuple(sample.labels[label] for label in labels)] += sample.value
    return found


@contextmanager
def counting(server: Server, name: str, *labels: str) -> Iterator[Values]:
    """What the counter grew by in the block, there when it ends."""
    grown: Values = Counter()
    before = scrape(server, name, *labels)
    yield grown
    grown.update(scrape(server, name, *labels) - before)
