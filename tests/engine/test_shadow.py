"""`--claa-shadow-rate`: what a dense prefill says of pruned answers is counted, and no client notices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Answer, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS
from tests.engine_server import Server, server
from tests.in_flight import MOMENT_FLAGS, Sent, batches, end_of_log, wait_for
from tests.reference_model import ReferenceModel
from tests.scrape import scrape

pytestmark = pytest.mark.engine

KEEP = 0.2
NEW = 16
LONG = 900  # tokens: in its chunks for a second
SHORT = Ask(tiny_models.prompt(100, seed=700), keep=0.3)


@pytest.fixture(scope="module")
def shadowing(tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    flags = (*CLAA_FLAGS, *TINY_FLAGS, *MOMENT_FLAGS, "--enable-metrics", "--claa-shadow-rate", "1")
    with server(tiny_model("llama"), *flags, env=STRICT | ONE_THREAD) as running:
        yield running


def stats(running: Server) -> dict[str, Any]:
    return running.get("/server_info").json()["claa"]["shadow"]


def settled(running: Server) -> int:
    """Requests whose shadow request is over."""
    shadow = stats(running)
    results = ("same", "different", "dropped", "failed")
    return sum(shadow[kind][result] for kind in ("greedy", "sampled") for result in results)


class Compared:
    """What the numbers of a server grow by, of one kind of sampling."""

    def __init__(self, running: Server, kind: str = "greedy") -> None:
        self._running, self._kind = running, kind
        self._before, self._settled = stats(running)[kind], settled(running)

    def of(self, count: int) -> dict[str, Any]:
        """Once `count` more are over."""
        wait_for(lambda: settled(self._running) == self._settled + count, f"{count} shadow requests are over")
        assert stats(self._running)["waiting"] == 0
        after = stats(self._running)[self._kind]
        return {name: after[name] - self._before[name] for name in after if isinstance(after[name], int)}


def by_own_request(running: Server, asked: Ask, answer: Answer) -> tuple[int, int]:
    """Tokens of the answer that are a dense request's likeliest, and those before the first that is not."""
    body = running.generate(
        input_ids=asked.prompt + answer.tokens,
        sampling_params=replace(asked, keep=None, new=1).params(),
        return_logprob=True,
        logprob_start_len=len(asked.prompt) - 1,
        top_logprobs_num=1,
    )
    tops = [top[0][1] for top in body["meta_info"]["input_top_logprobs"][1:]]
    agrees = [token == top for token, top in zip(answer.tokens, tops, strict=True)]
    return agrees.count(True), (*agrees, False).index(False)


def caught(running: Server, seed: int, new: int = 4) -> tuple[Ask, Answer]:
    """A request whose shadow request is in its chunks now, and its answer."""
    asked = Ask(tiny_models.prompt(LONG, seed=seed), keep=KEEP, new=new)
    answer = ask(running, asked)
    in_its_chunks(running)
    return asked, answer


def in_its_chunks(running: Server) -> None:
    mark = end_of_log(running)
    wait_for(lambda: sum(batch.prefill for batch in batches(running, mark)) >= 3, "the shadow request is in its chunks")


def test_it_counts_what_a_dense_request_says(shadowing: Server, llama_reference: ReferenceModel) -> None:
    """Also of streams, and of requests at once. What was found is on /metrics too, where no shadow is a request."""
    compared = Compared(shadowing)
    asked = [Ask(tiny_models.prompt(300, seed=701 + n), keep=KEEP, new=NEW) for n in range(3)]
    answers = [ask(shadowing, asked[0])]
    compared.of(1)
    answers += ask_together(shadowing, asked[1:])
    compared.of(3)
    body = {"input_ids": asked[0].prompt, "sampling_params": asked[0].params(), "stream": True}
    assert shadowing.post("/generate", body).status_code == 200
    found = compared.of(4)
    for one, answer in zip(asked, answers, strict=True):
        check(answer, llama_reference.pruned(one.prompt, answer.tokens, KEEP))

    own = [by_own_request(shadowing, one, answer) for one, answer in zip(asked, answers, strict=True)]
    own.append(own[0])  # the stream
    assert found["tokens"] == 4 * NEW and found["agreeing"] == sum(agreeing for agreeing, _ in own)
    assert found["before_difference"] == sum(before for _, before in own)
    assert found["same"] == sum(agreeing == NEW for agreeing, _ in own) and found["same"] + found["different"] == 4
    assert found["different"] and 0 < found["agreeing"] < found["tokens"], "the prompts show nothing"
    # Where the first one differs, the dense answer parts from the pruned one.
    for one, answer, (_, before) in zip(asked, answers, own, strict=False):
        dense = ask(shadowing, replace(one, keep=None))
        assert dense.cached <= len(one.prompt) and dense.tokens[:before] == answer.tokens[:before]
        assert before == NEW or dense.tokens[before] != answer.tokens[before]

    requests = scrape(shadowing, "sglang:claa_shadow_requests_total", "sampling", "result")
    assert requests == {("greedy", result): found[result] for result in ("same", "different") if found[result]}
    tokens = scrape(shadowing, "sglang:claa_shadow_tokens_total", "agrees")
    assert tokens == {("yes",): found["agreeing"], ("no",): found["tokens"] - found["agreeing"]}
    sent = 4 + 3 + 3  # pruned, with log probabilities, dense
    assert scrape(shadowing, "sglang:num_requests_total") == {(): sent}
    assert sum(scrape(shadowing, "sglang:claa_requests_total").values()) == sent
    check_idle(shadowing)


def test_what_keeps_everything_agrees_with_dense(shadowing: Server) -> None:
    compared = Compared(shadowing)
    answer = ask(shadowing, Ask(tiny_models.prompt(300, seed=705), keep=1.0, new=40))
    assert answer.report["pruned"]
    found = compared.of(1)
    assert found["same"] == 1 and found["agreeing"] == found["tokens"] == found["before_difference"] == 40


def test_sampled_answers_are_counted_apart_and_others_not_at_all(shadowing: Server) -> None:
    compared, greedy = Compared(shadowing, "sampled"), stats(shadowing)["greedy"]
    asked = Ask(tiny_models.prompt(300, seed=706), keep=KEEP, new=NEW)
    for more in ({"temperature": 1.0}, {"frequency_penalty": 0.5}, {"logit_bias": {"3": 2.0}}, {"n": 2}):
        shadowing.generate(input_ids=asked.prompt, sampling_params=asked.params() | more)
    ask(shadowing, replace(asked, keep=None))
    found = compared.of(1)
    assert found["tokens"] == NEW and found["same"] + found["different"] == 1
    assert found["agreeing"] < NEW, "a sampled answer that is the likeliest one"
    assert stats(shadowing)["greedy"] == greedy


def test_nothing_of_it_is_in_the_cache(shadowing: Server) -> None:
    shadowing.flush()
    compared = Compared(shadowing)
    asked = Ask(tiny_models.prompt(300, seed=707), keep=KEEP)
    ask(shadowing, asked)
    compared.of(1)
    assert ask(shadowing, replace(asked, keep=None)).cached == 0


def test_a_client_that_arrives_ends_it_and_gets_its_answer(shadowing: Server, llama_reference: ReferenceModel) -> None:
    """The client decodes on, and the shadow request waits. It is asked again when the client is gone."""
    asked, answer = caught(shadowing, seed=708)
    compared, mark = Compared(shadowing), end_of_log(shadowing)
    client = Sent(shadowing, replace(SHORT, new=260), "client")
    wait_for(lambda: sum(not batch.prefill for batch in batches(shadowing, mark)) > 20, "the client decodes")
    assert stats(shadowing)["waiting"] == 1
    prefills = [batch for batch in batches(shadowing, mark) if batch.prefill]
    assert len(prefills) < 4 + LONG // 32 // 2, "the shadow request ran to its end"
    status, body = client.answer()
    meta = body["meta_info"]
    expected = llama_reference.pruned(SHORT.prompt, body["output_ids"], SHORT.keep)
    assert status == 200
    check(Answer(body["output_ids"], meta["cached_tokens"], meta["claa"]), expected)
    found = compared.of(2)
    assert found["dropped"] == found["failed"] == 0 and found["tokens"] == 256 + len(answer.tokens)
    aborted = scrape(shadowing, "sglang:num_aborted_requests_total")
    assert not any(aborted.values())
    check_idle(shadowing)


def test_operations_do_not_wait_for_it(shadowing: Server, tiny_model: Callable[[str], Path]) -> None:
    """Emptying the cache ends it for a while, and so does a pause, which would keep it. New weights end it for good."""
    compared = Compared(shadowing)
    caught(shadowing, seed=709)
    assert shadowing.post("/flush_cache", {}).status_code == 200
    in_its_chunks(shadowing)
    assert shadowing.post("/pause_generation", {"mode": "in_place"}).status_code == 200
    time.sleep(0.3)  # the step that ran is in the log by then
    mark = end_of_log(shadowing)
    time.sleep(0.4)
    assert stats(shadowing)["waiting"] == 1 and not batches(shadowing, mark)
    assert shadowing.post("/continue_generation", {}).status_code == 200
    assert compared.of(1)["dropped"] == 0

    compared = Compared(shadowing)
    caught(shadowing, seed=711)
    body = {"model_path": str(tiny_model("llama"))}
    assert shadowing.post("/update_weights_from_disk", body).status_code == 200
    assert compared.of(1)["dropped"] == 1
    check_idle(shadowing)


def test_without_a_rate_nothing_is_asked(llama_server: Server) -> None:
    ask(llama_server, Ask(tiny_models.prompt(300, seed=712), keep=KEEP))
    mark = end_of_log(llama_server)
    time.sleep(0.6)
    assert not batches(llama_server, mark)
    assert stats(llama_server)["waiting"] == settled(llama_server) == 0
