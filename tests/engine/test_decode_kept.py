"""`--claa-decode-dense-layers`: generated tokens read, in early layers too, what was kept of the prompt.

Every answer is the reference's, which knows the rule and nothing of batches, chunks, retractions and caches. What was
generated so is not for others: it is not in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.traffic import retractions
from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS, SCHEDULE, SECOND
from tests.engine.test_cache_invariance import COMPANY, TARGET, expected
from tests.engine_server import Server, server
from tests.reference_model import ReferenceModel

pytestmark = pytest.mark.engine

DENSE_LAYERS, PRUNE_LAYER, CHUNK = 1, 3, 64
ALL = PRUNE_LAYER + 1
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}


@pytest.fixture(scope="module", params=["one prune", "two prunes, mixed chunks"])
def running(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    """Running requests are retracted every few steps, late prefills take several, and slots that are given back are
    soon somebody else's."""
    more = () if request.param == "one prune" else (*SCHEDULE, "--enable-mixed-chunk")
    flags = (*CLAA_FLAGS, *TINY_FLAGS, "--claa-decode-dense-layers", str(DENSE_LAYERS), *more)
    flags += ("--max-total-tokens", "3000")
    env = STRICT | ONE_THREAD | RETRACT
    with server(tiny_model("llama"), *flags, "--chunked-prefill-size", str(CHUNK), env=env) as made:
        yield made


@pytest.fixture(scope="module")
def reference(running: Server, tiny_model: Callable[[str], Path]) -> ReferenceModel:
    later = (SECOND,)[: len(running.get("/server_info").json()["claa"]["config"]["steps"]) - 1]
    return ReferenceModel(
        tiny_model("llama"),
        prune_layer=PRUNE_LAYER,
        score_layers=(0, 1, 2, 3),
        later=later,
        decode_dense_layers=DENSE_LAYERS,
    )


def test_cold_over_a_hit_and_as_it_was(running: Server, reference: ReferenceModel) -> None:
    running.flush()
    cold, warm = ask(running, TARGET), ask(running, TARGET)
    assert cold.report["decode_dense_layers"] == DENSE_LAYERS
    check(cold, expected(reference, TARGET, cold))
    assert (cold.cached, warm.cached) == (0, 1025 - 32)
    assert (warm.kept, warm.tokens) == (cold.kept, cold.tokens)
    everything = ask(running, replace(TARGET, options={"decode_dense_layers": ALL}))
    assert "decode_dense_layers" not in everything.report and everything.kept == cold.kept
    reference.decode_dense_layers = None
    try:
        check(everything, expected(reference, TARGET, everything))
    finally:
        reference.decode_dense_layers = DENSE_LAYERS
    assert everything.tokens != cold.tokens  # of this prompt the rule shows


def test_together_and_retracted(running: Server, reference: ReferenceModel) -> None:
    running.flush()
    mark = len(running.log())
    asked = [replace(one, new=one.new + 20) for one in (TARGET, *COMPANY)]
    for _ in range(2):  # cold, and over what the first time left
        for one, answer in zip(asked, ask_together(running, asked), strict=True):
            check(answer, expected(reference, one, answer))
    assert retractions(running.log()[mark:])["forced"] > 3
    check_idle(running)


def test_what_was_generated_is_not_found_by_a_follow_up(running: Server, reference: ReferenceModel) -> None:
    running.flush()
    first = ask(running, replace(TARGET, new=40))
    follow = Ask(TARGET.prompt + first.tokens + tiny_models.prompt(60, seed=5), keep=0.2, new=12)
    answer = ask(running, follow)
    assert answer.cached == len(TARGET.prompt)
    check(answer, expected(reference, follow, answer))
    # One that reads everything leaves what it generated, as ever.
    again = ask(running, replace(TARGET, new=40, options={"decode_dense_layers": ALL}))
    follow = replace(follow, prompt=TARGET.prompt + again.tokens + tiny_models.prompt(60, seed=6))
    assert ask(running, follow).cached == len(TARGET.prompt) + 39
    check_idle(running)


@pytest.mark.parametrize("layers", [0, DENSE_LAYERS + 1, True, "1", -1, 10_000])
def test_other_layers_are_refused(layers: object, running: Server) -> None:
    params = replace(TARGET, options={"decode_dense_layers": layers}).params()
    answer = running.post("/generate", {"input_ids": TARGET.prompt, "sampling_params": params})
    assert answer.status_code == 400 and "custom_params.claa.decode_dense_layers" in answer.text
