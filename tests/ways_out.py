"""What must hold however a pruned request ended; shared by the tests of requests and of weight updates."""

from __future__ import annotations

from typing import Any

from tests import tiny_models
from tests.answers import Answer, Ask, ask, check, check_idle
from tests.engine_server import Server
from tests.in_flight import Sent, wait_for
from tests.reference_model import ReferenceModel

KEEP = 0.3
ENDLESS = 5000  # tokens, a minute or more of decoding: no test waits for that


def target(stage: str, seed: int, new: int = ENDLESS) -> Ask:
    """A request to be caught at `stage`: long enough to be caught in its chunks, else quickly through them."""
    return Ask(tiny_models.prompt(2000 if stage == "in its chunks" else 300, seed=seed), keep=KEEP, new=new)


def held(running: Server) -> int:
    """Late slots that requests hold now."""
    return running.get("/server_info").json()["claa"]["late_slots"]["held"]


def check_after(running: Server, reference: ReferenceModel, prompt: list[int]) -> None:
    """Nothing is held, `prompt` has the right answer over what is in the cache, and the cache can be emptied."""
    wait_for(lambda: held(running) == 0, "every late slot is back")
    answer = ask(running, Ask(prompt, keep=KEEP))
    check(answer, reference.pruned(prompt, answer.tokens, KEEP))
    check_idle(running)


def check_whole(reference: ReferenceModel, asked: Ask, sent: Sent) -> dict[str, Any]:
    """The request was answered in full, and right. Returns its meta_info."""
    status, body = sent.answer()
    meta = body.get("meta_info", {})
    assert status == 200 and meta["finish_reason"]["type"] == "length", body
    answer = Answer(body["output_ids"], meta["cached_tokens"], meta["claa"])
    assert len(answer.tokens) == asked.new and asked.keep is not None
    check(answer, reference.pruned(asked.prompt, answer.tokens, asked.keep))
    return meta


def check_aborted(stage: str, status: int, body: dict[str, Any]) -> None:
    """It ended as aborted, where it was caught."""
    assert status == 200 and body["meta_info"]["finish_reason"]["type"] == "abort", body
    tokens = body["meta_info"]["completion_tokens"]
    assert (0 < tokens < ENDLESS) if stage == "decoding" else tokens == 0
