"""The checks find what they are for: a broken invariant, planted in a real server, stops it and is named in its log.

Faults are brought in by a second SGLang plugin, installed for the test on PYTHONPATH.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.answers import STRICT, TINY_ENV, TINY_FLAGS, Ask
from tests.engine.conftest import CLAA_FLAGS
from tests.engine_server import second_plugin, server
from tests.tiny_models import prompt

pytestmark = pytest.mark.engine

ONE_NAMESPACE = """
def register():
    from claa_sglang.patches import requests

    requests.pruned_key = lambda extra_key, namespace: extra_key
"""
# A count that is not 0 when all is free: were slots really kept, SGLang's own count of the pool would come first.
SLOTS_HELD = """
def register():
    from claa_sglang import late_slots

    late_slots.LateSlots.held = property(lambda self: 5)
"""
IDLE_ONLY = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}


@pytest.mark.parametrize(
    ("source", "env", "says"),
    [
        pytest.param(ONE_NAMESPACE, STRICT, "reads dense KV from 200 slots", id="a-shared-namespace-while-busy"),
        pytest.param(SLOTS_HELD, IDLE_ONLY, "5 late slots are held while the server is idle", id="late-slots-at-idle"),
    ],
)
def test_a_planted_fault_is_found(
    source: str, env: dict[str, str], says: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    plugin = second_plugin(tmp_path, "claa_test_planted", source)
    with server(tiny_model("llama"), *CLAA_FLAGS, *TINY_FLAGS, env={**plugin, **TINY_ENV, **env}) as running:
        for keep, length in ((0.5, 200), (None, 240)):  # the dense prompt begins with the pruned one
            params = Ask([], keep, new=40).params()
            body = {"input_ids": prompt(length, seed=1), "sampling_params": params}
            try:
                requests.post(f"{running.url}/generate", json=body, timeout=60)
            except requests.ConnectionError:
                break
        deadline = time.monotonic() + 60
        while says not in running.log() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert says in running.log()
