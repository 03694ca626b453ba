"""Which ports servers are started on, and what is said of one that went away."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from claa_sglang.tools import servers

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not RANGE.exists(), reason="Linux says which ports its connections get")
def test_no_connection_is_given_the_port_meanwhile() -> None:
    first, last = map(int, RANGE.read_text().split())
    if first >= servers.PORTS.stop:  # as Linux has it, unless told otherwise
        assert all(not first <= servers.free_port() <= last for _ in range(100))


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", servers.free_port()))
        port = taken.getsockname()[1]
        monkeypatch.setattr(servers, "PORTS", range(port, port + 1))
        with pytest.raises(OSError, match=f"no free port found from {port} to {port}"):
            servers.free_port()
    assert servers.free_port() == port


def test_what_a_server_that_is_gone_said_last_is_in_the_error(tmp_path: Path) -> None:
    process: Any = None
    log = tmp_path / "server.log"
    log.write_text("\n".join(f"line {i}" for i in range(500)))
    gone = servers.Server(f"http://127.0.0.1:{servers.free_port()}", process, log)
    for ask in (lambda: gone.get("/server_info"), lambda: gone.post("/generate", {}), gone.flush):
        with pytest.raises(servers.ServerGone, match="line 499") as caught:
            ask()
        assert "line 100\n" not in str(caught.value)
