"""The server compares what every scheduler reports with its own configuration, also behind a controller of replicas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from claa_sglang.patches import startup

GOOD = {"config": {"window": 32}, "hooks": 35, "startup_seconds": {"flags": 0.1}}
SLOWER = {**GOOD, "startup_seconds": {"flags": 0.9}}
OTHER = {**GOOD, "config": {"window": 5}}
NO_HOOKS = {**GOOD, "hooks": 0}


class Refused(Exception):
    """Of a server that would have stopped."""


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.runtime_context as runtime_context

    def refuse(_args: Any, rank: int, _expected: Any, found: Any, _processes: Any) -> None:
        raise Refused(rank, found)

    config = SimpleNamespace(to_dict=lambda: GOOD["config"])
    monkeypatch.setattr(runtime_context, "get_context", lambda: SimpleNamespace(server_args=None))
    monkeypatch.setattr(startup, "config_of", lambda _server_args: config)
    monkeypatch.setattr(startup, "_refuse", refuse)
    monkeypatch.setattr(startup, "_keep_sockets", lambda: None)


def through_a_controller(*reports: dict[str, Any] | None) -> dict[str, Any]:
    """What a controller sends for replicas that sent these."""
    controller = SimpleNamespace(_scheduler_init_infos=[{"claa": one} if one else {} for one in reports])
    return startup.report_of_replicas({"max_req_input_len": 7}, controller)


def start(*infos: dict[str, Any]) -> list[dict[str, Any]]:
    return startup.require_active(lambda readers, processes: list(infos), [], [])


def test_equal_schedulers_start() -> None:
    assert start({"claa": GOOD}, {"claa": SLOWER}) == [{"claa": GOOD}, {"claa": SLOWER}]


def test_equal_replicas_start_and_the_first_one_s_report_is_shown() -> None:
    (info,) = start(through_a_controller(GOOD, SLOWER))
    assert info["max_req_input_len"] == 7
    assert info["claa"] == {**GOOD, "replicas": [GOOD, SLOWER]}


@pytest.mark.parametrize("bad", [OTHER, NO_HOOKS, None], ids=["other config", "no hooks", "no report"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_replica_that_differs_stops_the_server(bad: dict[str, Any] | None, rank: int) -> None:
    """Whichever it is, and however long the others took."""
    reports: list[dict[str, Any] | None] = [GOOD, SLOWER]
    reports.insert(rank, bad)
    with pytest.raises(Refused) as refused:
        start(through_a_controller(*reports))
    assert refused.value.args == (rank, bad or {})


@pytest.mark.parametrize("bad", [{"claa": OTHER}, {"claa": NO_HOOKS}, {}])
def test_one_scheduler_that_differs_stops_the_server(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        start({"claa": GOOD}, bad)
