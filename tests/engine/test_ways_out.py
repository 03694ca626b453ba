"""Every way out frees everything: however a pruned request ends, nothing is held, and the next one is answered right.

Strict accounting runs in every step and at idle: whatever is not accounted for stops the server. After each way out
the same prompt is asked again, over what the ended request left in the prefix cache, and held against the reference.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import byte_tokenizer, in_flight, tiny_models
from tests.answers import ONE_THREAD, STRICT, Answer, Ask, check
from tests.engine.conftest import CLAA_FLAGS
from tests.engine_server import Server, server
from tests.in_flight import MOMENT_FLAGS, STAGES, Sent, batches, catch, end_of_log, wait_for
from tests.reference_model import ReferenceModel
from tests.ways_out import ENDLESS, KEEP, check_aborted, check_after, check_whole, held, target

pytestmark = pytest.mark.engine

WAITING_TIMEOUT, RUNNING_TIMEOUT = 2.0, 6.0  # seconds


@pytest.fixture(scope="module")
def served(moments_server: Server) -> Server:
    return moments_server


# --- its own end ---


@pytest.mark.parametrize("way", ["length", "stop string", "stop token"])
def test_a_normal_end(served: Server, llama_reference: ReferenceModel, model: Path, way: str) -> None:
    from transformers import AutoTokenizer

    prompt = tiny_models.prompt(300, seed=5)
    whole = served.generate(input_ids=prompt, sampling_params=Ask(prompt, KEEP, new=30).params())
    tokens, text = whole["output_ids"], whole["text"]
    check(Answer(tokens, 0, whole["meta_info"]["claa"]), llama_reference.pruned(prompt, tokens, KEEP))
    decode = AutoTokenizer.from_pretrained(model).decode
    assert byte_tokenizer.EOS_ID not in tokens
    # A token that can end the answer: nowhere before, neither itself nor its text.
    last = next(i for i in range(5, 30) if len(decode(tokens[i])) == 2 and text.count(decode(tokens[i])) == 1)
    params, reason = {
        "length": ({"max_new_tokens": last + 1}, "length"),
        "stop string": ({"stop": [decode(tokens[last])]}, "stop"),
        "stop token": ({"stop_token_ids": [tokens[last]], "ignore_eos": False}, "stop"),
    }[way]
    ended = served.generate(input_ids=prompt, sampling_params=Ask(prompt, KEEP, new=30).params() | params)
    assert ended["output_ids"] == tokens[: last + 1] and ended["meta_info"]["finish_reason"]["type"] == reason
    check_after(served, llama_reference, prompt)


# --- ended by the client ---


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("which", ["one", "all"])
def test_an_abort(served: Server, llama_reference: ReferenceModel, which: str, stage: str) -> None:
    asked = target(stage, seed=210)
    beside, sent = catch(served, stage, asked)
    assert held(served) > 0
    served.post("/abort_request", {"rid": sent.rid} if which == "one" else {"abort_all": True})
    check_aborted(stage, *sent.answer())
    for neighbour, other in beside:
        if which == "one":
            check_whole(llama_reference, neighbour, other)
        else:
            check_aborted("decoding", *other.answer())
    check_after(served, llama_reference, asked.prompt)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_disconnect(served: Server, llama_reference: ReferenceModel, stream: bool, stage: str) -> None:
    asked = target(stage, seed=211)
    mark = end_of_log(served)
    # SGLang looks for closed connections every four seconds; until then the queue must not move.
    beside, sent = catch(served, stage, asked, company=500, stream=stream)
    sent.hang_up()
    for neighbour, other in beside:
        check_whole(llama_reference, neighbour, other)
    wait_for(lambda: held(served) == 0, "every late slot is back")
    # It was ended, and did not run to its end.
    assert sum(not batch.prefill for batch in batches(served, mark)) < ENDLESS // 2
    check_after(served, llama_reference, asked.prompt)


def test_who_is_answered_too_soon_is_caught_again(
    served: Server, llama_reference: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice a companion has ended before the others are there, as when this process gets no core for seconds."""
    made, companion = [], in_flight.companion
    asked = target("in the queue", seed=216, new=20)

    def short_at_first(index: int, new: int) -> Ask:
        made.append(index)
        return companion(index, 2 if len(made) < 3 else new)

    with monkeypatch.context() as patch:
        patch.setattr(in_flight, "companion", short_at_first)
        beside, sent = catch(served, "in the queue", asked)
    assert made[:2] == [0, 0] and made[-2:] == [0, 1]
    for one, its in [*beside, (asked, sent)]:
        check_whole(llama_reference, one, its)
    check_after(served, llama_reference, asked.prompt)


# --- ended by the server ---


def test_a_grammar_that_does_not_compile(served: Server, llama_reference: ReferenceModel) -> None:
    prompt = tiny_models.prompt(300, seed=212)
    for grammar in ({"regex": "("}, {"regex": "("}, {"json_schema": '{"type": "nonsense"}'}):  # the second is cached
        body = {"input_ids": prompt, "sampling_params": Ask(prompt, KEEP).params() | grammar}
        answer = served.post("/generate", body)
        assert answer.status_code == 400 and "Failed to compile" in answer.text, answer.text
    check_after(served, llama_reference, prompt)


@pytest.fixture(scope="module")
def impatient(model: Path) -> Iterator[Server]:
    timeouts = {
        "SGLANG_REQ_WAITING_TIMEOUT": str(WAITING_TIMEOUT),
        "SGLANG_REQ_RUNNING_TIMEOUT": str(RUNNING_TIMEOUT),
    }
    with server(model, *CLAA_FLAGS, *MOMENT_FLAGS, env=STRICT | ONE_THREAD | timeouts) as running:
        yield running


def check_timed_out(sent: Sent, what: str) -> None:
    status, body = sent.answer()
    assert status == 503 and f"Request {what} timeout reached" in str(body), body


@pytest.mark.parametrize("stage", STAGES)
def test_a_timeout(impatient: Server, llama_reference: ReferenceModel, stage: str) -> None:
    asked = target(stage, seed=213)
    if stage == "in its chunks":  # more of them than fit into the time
        asked = Ask(tiny_models.prompt(7000, seed=213), KEEP)
    beside, sent = catch(impatient, stage, asked, company=ENDLESS // 2)
    if stage == "in its chunks":  # SGLang drops the message and the status of this one, of dense requests too
        check_aborted(stage, *sent.answer())
    else:
        check_timed_out(sent, "waiting" if stage == "in the queue" else "running")
    for _, other in beside:
        check_timed_out(other, "running")
    check_after(impatient, llama_reference, asked.prompt[:300])


# --- flushes ---


@pytest.mark.parametrize("stage", STAGES)
def test_a_flush_while_busy_is_refused(served: Server, llama_reference: ReferenceModel, stage: str) -> None:
    asked = target(stage, seed=214, new=200)
    beside, sent = catch(served, stage, asked)
    assert served.post("/flush_cache").status_code == 400
    for one, its in [*beside, (asked, sent)]:
        check_whole(llama_reference, one, its)
    check_after(served, llama_reference, asked.prompt)


# --- the server's own end ---


@pytest.mark.ends_server
def test_a_shutdown_under_load(served: Server, llama_reference: ReferenceModel) -> None:
    """It ends the server of the others, which has been through all of the above and the weight updates."""
    asked = target("in the queue", seed=215, new=50)
    beside, sent = catch(served, "in the queue", asked)
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert len(family) >= 2, "a scheduler and a detokenizer"
    mark = len(served.log())
    served.process.terminate()
    for one, its in [*beside, (asked, sent)]:
        try:
            check_whole(llama_reference, one, its)
        except (OSError, http.client.HTTPException):
            pass  # it hung up, which is an answer too
    served.process.wait(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    log = served.log()[mark:]
    assert not re.search(r'File ".*claa_sglang', log), log[-5000:]
