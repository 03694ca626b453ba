"""The clock of a streamed answer stops at its first token, and a stream that fails says why."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from claa_sglang.tools.streaming import StreamFailed, timed
from tests.http_server import Quiet, serving

BEFORE, BETWEEN = 0.03, 0.2  # seconds


@contextmanager
def streaming(*events: Any, status: int = 200) -> Iterator[str]:
    """A server that waits, sends the first event, waits longer, and sends the others."""

    class Handler(Quiet):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(BEFORE)
            self.send_response(status)
            self.end_headers()
            if status != 200:  # SGLang answers at once, and not as a stream
                self.wfile.write(json.dumps(events[0]).encode())
                return
            for index, event in enumerate(events):
                time.sleep(BETWEEN if index else 0)
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")

    with serving(Handler) as url:
        yield url


def test_the_clock_stops_at_the_first_token() -> None:
    with streaming({"text": "a", "meta_info": {}}, {"text": "ab", "meta_info": {"n": 2}}) as url:
        began = time.perf_counter()
        first, last = timed(url, {}, 10.0)
        whole = time.perf_counter() - began
    assert last == {"text": "ab", "meta_info": {"n": 2}}
    assert BEFORE <= first <= whole - 0.9 * BETWEEN


@pytest.mark.parametrize("status", [200, 400])
def test_what_the_server_says_is_in_the_error(status: int) -> None:
    with streaming({"error": {"message": "planted"}}, status=status) as url:
        with pytest.raises(StreamFailed, match=f"HTTP {status}.*planted") as caught:
            timed(url, {}, 10.0)
    assert caught.value.status == status
