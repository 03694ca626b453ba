"""`--claa-mode observe`: stock's answers, and reports of what would have been kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import planted, tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Answer, Ask, ask, ask_together, check_idle
from tests.engine.conftest import CLAA_FLAGS, SHARED_CHUNK
from tests.engine_server import Server, second_plugin, server
from tests.reference_model import ReferenceModel
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.engine

PLUGIN = """
def register():
    from tests import planted
    planted.in_a_forward()
"""
KEEP = 0.3
OBSERVED = "observed: nothing was dropped (--claa-mode observe)"


@pytest.fixture(scope="module")
def observing(
    fault: Path, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    plugin = second_plugin(tmp_path_factory.mktemp("plugin"), "claa_test_observe", PLUGIN)
    flags = (*CLAA_FLAGS, "--claa-mode", "observe", *TINY_FLAGS, "--chunked-prefill-size", str(SHARED_CHUNK))
    env = {**plugin, planted.FILE: str(fault), **STRICT, **ONE_THREAD}
    with server(tiny_model("llama"), *flags, env=env) as running:
        yield running


def opted_out(asked: Ask) -> Ask:
    """The same request, of a server without CLAA."""
    return replace(asked, keep=None)


def assert_same(answer: Answer, stock: Answer) -> None:
    assert answer.tokens == stock.tokens and answer.cached == stock.cached
    if stock.logprobs is not None:
        assert answer.logprobs is not None and torch.equal(answer.logprobs, stock.logprobs)


def test_answers_are_stock_s_and_the_report_says_what_would_be_kept(
    observing: Server, off_server: Server, llama_reference: ReferenceModel
) -> None:
    """In one chunk, in several, over hits that leave enough to rank and over one that does not."""
    base = tiny_models.prompt(600, seed=60)
    prompts = [base[:200], base, base + tiny_models.prompt(90, seed=61), base[:590] + [3], [5]]
    for running in (observing, off_server):
        running.flush()
    for prompt in prompts:
        asked = Ask(prompt, keep=KEEP, new=6)
        answer, stock = ask(observing, asked, VOCAB_SIZE), ask(off_server, opted_out(asked), VOCAB_SIZE)
        assert_same(answer, stock)
        report = answer.report
        assert report["pruned"] is False and report["kept_tokens"] == len(prompt)
        if len(prompt) == 1:
            assert report["reason"].startswith("prompt of at most") and "would_keep" not in report
        elif len(prompt) - stock.cached < 32 or (len(prompt) - stock.cached) % SHARED_CHUNK < 32:
            assert report["reason"] == OBSERVED and report["would_keep"] is None
        else:
            assert report["reason"] == OBSERVED
            expected = llama_reference.pruned(prompt, answer.tokens, KEEP)
            assert report["would_keep"]["kept"] == expected.kept[0]
            assert report["would_keep"]["keep_rate"] == KEEP and report["would_keep"]["prune_layer"] == 3
    check_idle(observing)


def test_in_a_batch_and_switched_off(observing: Server, off_server: Server, llama_reference: ReferenceModel) -> None:
    for running in (observing, off_server):
        running.flush()
    asked = [Ask(tiny_models.prompt(40 + 30 * n, seed=600 + n), keep=None if n == 2 else KEEP) for n in range(5)]
    answers = ask_together(observing, asked)
    for one, answer, stock in zip(asked, answers, ask_together(off_server, list(map(opted_out, asked))), strict=True):
        assert answer.tokens == stock.tokens
        if one.keep is None:
            assert answer.report["reason"] == "disabled by request" and "would_keep" not in answer.report
        else:
            expected = llama_reference.pruned(one.prompt, answer.tokens, KEEP)
            assert answer.report["would_keep"]["kept"] == expected.kept[0]
    slots = observing.get("/server_info").json()["claa"]["late_slots"]
    assert slots["held"] == 0
    check_idle(observing)


def test_what_fails_is_logged_and_the_answer_is_stock_s(observing: Server, off_server: Server, fault: Path) -> None:
    asked = Ask(tiny_models.prompt(150, seed=617), keep=KEEP)
    fault.write_text("scoring")
    try:
        answer = ask(observing, asked)
    finally:
        fault.write_text("")
    assert answer.tokens == ask(off_server, opted_out(asked)).tokens
    assert answer.report["reason"] == OBSERVED and answer.report["would_keep"] is None
    assert "planted scoring" in observing.log()
    assert ask(observing, replace(asked, prompt=asked.prompt[::-1])).report["would_keep"] is not None
