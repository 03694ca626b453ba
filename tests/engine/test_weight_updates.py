"""New weights while pruned requests run: their answers are right or they are aborted, and nothing is held.

Most updates here load the same weights again, so that what a request was before an update and what it is after one
have one right answer between them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.answers import Ask, ask, check
from tests.engine_server import Server
from tests.in_flight import STAGES, catch
from tests.reference_model import ReferenceModel
from tests.ways_out import KEEP, check_aborted, check_after, check_whole, target

pytestmark = pytest.mark.engine

STAGE = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(scope="module")
def served(moments_server: Server) -> Server:
    """Its tokenizer does not matter here: prompts and answers are tokens."""
    return moments_server


def load(running: Server, model: Path, **more: Any) -> tuple[int, str]:
    """Status and message of a weight update."""
    answer = running.post("/update_weights_from_disk", {"model_path": str(model), **more})
    return answer.status_code, answer.json()["message"]


def test_other_weights_give_other_answers_at_once(
    served: Server,
    tiny_model: Callable[[str], Path],
    llama_reference: ReferenceModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What the old weights left in the cache is not read, neither KV nor boundary states."""
    other = tiny_models.build("llama", tmp_path_factory.mktemp("other-weights"), seed=1)
    other_reference = ReferenceModel(other, prune_layer=3, score_layers=(0, 1, 2, 3))
    asked = Ask(tiny_models.prompt(300, seed=220), keep=KEEP)
    for model, reference in (
        (tiny_model("llama"), llama_reference),
        (other, other_reference),
        (tiny_model("llama"), llama_reference),
    ):
        assert load(served, model)[0] == 200
        for cached in (0, 300 - 32):
            answer = ask(served, asked)
            assert answer.cached == cached
            check(answer, reference.pruned(asked.prompt, answer.tokens, KEEP))
    check_after(served, llama_reference, asked.prompt)


@STAGE
@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_requests_go_on_after_a_pause(
    served: Server, tiny_model: Callable[[str], Path], llama_reference: ReferenceModel, mode: str, stage: str
) -> None:
    asked = target(stage, seed=221, new=200)
    beside, sent = catch(served, stage, asked)
    assert served.post("/pause_generation", {"mode": mode}).status_code == 200
    try:
        # With requests in place, SGLang cannot empty its cache, and says so; retracted ones hold nothing of it.
        status, message = load(served, tiny_model("llama"))
        assert (status == 200) == (mode == "retract"), message
        assert load(served, tiny_model("llama"), flush_cache=False)[0] == 200
    finally:
        served.post("/continue_generation", {})
    retracted = [check_whole(llama_reference, *pair)["num_retractions"] for pair in [*beside, (asked, sent)]]
    assert any(retracted) == (mode == "retract")
    check_after(served, llama_reference, asked.prompt)


@STAGE
def test_a_pause_that_aborts(
    served: Server, tiny_model: Callable[[str], Path], llama_reference: ReferenceModel, stage: str
) -> None:
    asked = target(stage, seed=222)
    beside, sent = catch(served, stage, asked)
    assert served.post("/pause_generation", {"mode": "abort"}).status_code == 200
    try:
        check_aborted(stage, *sent.answer())
        for _, other in beside:
            check_aborted("decoding", *other.answer())
        assert load(served, tiny_model("llama"))[0] == 200
    finally:
        served.post("/continue_generation", {})
    check_after(served, llama_reference, asked.prompt)


@pytest.mark.parametrize("abort", [False, True], ids=["waits", "aborts"])
def test_an_update_without_a_pause(
    served: Server, tiny_model: Callable[[str], Path], llama_reference: ReferenceModel, abort: bool
) -> None:
    """It waits for running requests to end, or ends them; then the last step may still hold the cache."""
    asked = target("in its chunks", seed=223, **({} if abort else {"new": 50}))
    beside, sent = catch(served, "in its chunks", asked)
    status, message = load(served, tiny_model("llama"), abort_all_requests=abort)
    assert status == 200 or (abort and "cache was not flushed because requests are still running" in message), message
    for one, its in [*beside, (asked, sent)]:
        if abort:
            check_aborted("in its chunks" if its is sent else "decoding", *its.answer())
        else:
            check_whole(llama_reference, one, its)
    check_after(served, llama_reference, asked.prompt)
