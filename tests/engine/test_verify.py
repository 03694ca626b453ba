"""`claa-sglang verify` on a real server that others use: every claim holds, and nobody's answer or cache is touched."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from claa_sglang import cli
from tests import tiny_models
from tests.answers import Ask, ask, check_idle
from tests.engine_server import Server

pytestmark = pytest.mark.engine

# A tiny model is launched more than it computes: that pruning it is faster is not claimed.
SMALL = ("--tokens", "400", "--ttft-tokens", "400", "--prompts", "2", "--needles", "2", "--pairs", "5")
NO_TTFT_CLAIM = ("--ttft-at-most", "1000")
OTHERS = (
    Ask(tiny_models.prompt(300, seed=900), keep=0.3, new=16),
    Ask(tiny_models.prompt(350, seed=901), new=16),
)


def test_every_claim_holds_beside_requests_of_others(llama_server: Server, tmp_path: Path) -> None:
    llama_server.flush()
    expected = [ask(llama_server, one) for one in OTHERS]
    answered, wrong, over = [0], [], threading.Event()

    def go_on() -> None:
        while not over.is_set():
            for one, right in zip(OTHERS, expected, strict=True):
                answer = ask(llama_server, one)
                answered[0] += 1
                if (answer.tokens, answer.kept) != (right.tokens, right.kept) or not answer.cached:
                    wrong.append(answer)

    others = threading.Thread(target=go_on)
    others.start()
    try:
        status = cli.main(
            ["verify", "--url", llama_server.url, *SMALL, *NO_TTFT_CLAIM, "--out", str(tmp_path / "v.json")]
        )
    finally:
        over.set()
        others.join()
    record = json.loads((tmp_path / "v.json").read_text())
    assert status == 0 and [claim["ok"] for claim in record["claims"]] == [True] * 4 + [None, True], record["claims"]
    assert record["cost"]["requests"] == record["plan"]["requests"] - 2 - 4 + 1  # no text to count, no needles
    assert answered[0] > 10 and not wrong
    check_idle(llama_server)
