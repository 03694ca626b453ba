"""The checks find what they are for: a broken invariant, planted in a real server, stops it and is named in its log.

Faults are brought in by a second SGLang plugin, installed for the test on PYTHONPATH.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Ask
from tests.engine.conftest import CLAA_FLAGS
from tests.engine_server import QUICKER, second_plugin, server, start_failure
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
    from claa_sglang.memory import late_slots

    late_slots.LateSlots.held = property(lambda self: 5)
"""
IDLE_ONLY = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}


def test_a_shared_namespace_is_found_while_busy(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    plugin = second_plugin(tmp_path, "claa_test_planted", ONE_NAMESPACE)
    says = "reads dense KV from 200 slots"
    with server(tiny_model("llama"), *CLAA_FLAGS, *TINY_FLAGS, env={**plugin, **ONE_THREAD, **STRICT}) as running:
        for keep, length in ((0.5, 200), (None, 240)):  # the dense prompt begins with the pruned one
            params = Ask([], keep, new=40).params()
            body = {"input_ids": prompt(length, seed=1), "sampling_params": params}
            try:
                requests.post(f"{running.url}/generate", json=body, timeout=60)
            except (requests.ConnectionError, requests.Timeout):  # the server is going down, sooner or later
                break
        deadline = time.monotonic() + 60
        while says not in running.log() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert says in running.log()


def test_late_slots_held_at_idle_are_found(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The first idle moment is before the server is ready."""
    plugin = second_plugin(tmp_path, "claa_test_planted", SLOTS_HELD)
    env = {**plugin, **QUICKER, **ONE_THREAD, **IDLE_ONLY}
    log = start_failure(tiny_model("llama"), *CLAA_FLAGS, *TINY_FLAGS, env=env)
    assert "5 late slots are held while the server is idle" in log
