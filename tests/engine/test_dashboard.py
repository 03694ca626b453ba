"""Every query of the dashboard, answered by a real Prometheus that scrapes a server."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from claa_sglang.tools.servers import free_port
from docs.generate.dashboard import PANELS
from tests.engine_server import Server
from tests.in_flight import wait_for
from tests.routes_server import GREEDY, options, text
from tests.scrape import scrape

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(PROMETHEUS is None, reason="no Prometheus: apt-get install prometheus"),
]
CONFIG = """
scrape_configs:
  - job_name: sglang
    scrape_interval: 1s
    static_configs: [{targets: ["%s"]}]
"""
TOTAL = 'sum({__name__=~"sglang.claa_requests_total"})'
# Of a server that finishes nothing, asks nothing twice, and where nothing failed, as the one of these tests.
EMPTY = ("claa_finish", "claa_shadow", 'outcome="failed"')


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, query: str) -> list[dict[str, Any]]:
        answer = requests.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=10).json()
        assert answer["status"] == "success", f"{query}: {answer}"
        return answer["data"]["result"]

    def is_up(self) -> bool:
        try:
            return requests.get(f"{self.url}/-/ready", timeout=10).status_code == 200
        except requests.ConnectionError:
            return False


@pytest.fixture(scope="module")
def prometheus(routes_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    home = tmp_path_factory.mktemp("prometheus")
    (home / "prometheus.yml").write_text(CONFIG % routes_server.url.removeprefix("http://"))
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/data"]
    command = [str(PROMETHEUS), *flags, f"--web.listen-address={address}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            made = Prometheus(f"http://{address}")
            wait_for(made.is_up, "Prometheus answers")
            yield made
        finally:
            process.terminate()


def test_every_query_has_an_answer(prometheus: Prometheus, routes_server: Server) -> None:
    def counted() -> float:
        return sum(scrape(routes_server, "sglang:claa_requests_total").values())

    def scraped() -> float:
        return sum(float(found["value"][1]) for found in prometheus.ask(TOTAL))

    for turn in range(3):  # a rate is of two scrapes
        for kind in (GREEDY, options(enabled=False)):
            routes_server.generate(text=text("dashboard"), sampling_params=kind)
        wait_for(lambda: scraped() == counted(), f"turn {turn} was scraped")
    time.sleep(2)
    for panel in PANELS:
        for query in panel.queries:
            found = prometheus.ask(query)
            assert found or any(name in query for name in EMPTY), f"{panel.title}: {query} has no answer"
    kept = prometheus.ask(next(panel for panel in PANELS if "kept" in panel.title).queries[0])
    assert 0 < float(kept[0]["value"][1]) < 1
