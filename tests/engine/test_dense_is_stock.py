"""Off is off, and dense is stock: tokens, log probabilities and cached-token counts, bit for bit.

One sequence of requests runs on stock SGLang with the plugin kept out, on SGLang with the plugin and without its flag,
and on a server with CLAA, where pruned requests of the same prompts run between them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.answers import ONE_THREAD, TINY_FLAGS, TOLERANCE, Answer, Ask, ask, ask_together
from tests.engine.conftest import SHARED_CHUNK
from tests.engine_server import Server, server
from tests.reference_model import ReferenceModel
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.engine

BASE = tiny_models.prompt(700, seed=80)
SINGLE = {
    "chunked": BASE,
    "the same again": BASE,
    "another end": BASE[:500] + tiny_models.prompt(60, seed=81),
    "a longer one": BASE + tiny_models.prompt(300, seed=82),
    "short": tiny_models.prompt(45, seed=83),  # longer than the window, so that it can be pruned
    "one token": [7],
}
# No two of them share anything but what is cached before: who computes a shared part would depend on arrival times.
TOGETHER = [
    BASE[:650] + tiny_models.prompt(30, seed=84),
    tiny_models.prompt(450, seed=85),
    tiny_models.prompt(257, seed=86),
    tiny_models.prompt(11, seed=87),
]


def transcript(running: Server, between: Callable[[list[int]], object] = lambda prompt: None) -> dict[str, Answer]:
    """Answers of the sequence, from an empty cache; `between` is called before each request."""
    running.flush()
    answers = {}
    for name, prompt in SINGLE.items():
        between(prompt)
        answers[name] = ask(running, Ask(prompt, new=6), VOCAB_SIZE)
    second = BASE + answers["chunked"].tokens + tiny_models.prompt(30, seed=88)
    between(second)
    answers["second turn"] = ask(running, Ask(second), VOCAB_SIZE)
    for i, answer in enumerate(ask_together(running, [Ask(prompt, new=10) for prompt in TOGETHER])):
        answers[f"together {i}"] = answer
    body = {"return_logprob": True, "logprob_start_len": 0}
    answers["input logprobs"] = ask(running, Ask(tiny_models.prompt(300, seed=89), extra=body))
    return answers


def essence(answers: dict[str, Answer]) -> dict[str, Any]:
    """What must be equal. Kernels may round by batch, and who is batched depends on arrival: log probabilities of
    single requests only."""
    return {
        name: (a.tokens, a.cached, None if a.logprobs is None else a.logprobs.tolist()) for name, a in answers.items()
    }


@pytest.fixture(scope="module")
def stock(tiny_model: Callable[[str], Path]) -> dict[str, Answer]:
    """Stock SGLang: the plugin is not even loaded."""
    flags = (*TINY_FLAGS, "--chunked-prefill-size", str(SHARED_CHUNK))
    with server(tiny_model("llama"), *flags, env=ONE_THREAD | {"SGLANG_PLUGINS": "none"}) as running:
        return transcript(running)


def test_the_sequence_covers_hits_and_misses(stock: dict[str, Answer]) -> None:
    assert stock["chunked"].cached == stock["short"].cached == 0
    assert stock["the same again"].cached == 699 and stock["another end"].cached == 500
    assert stock["second turn"].cached >= 705 and stock["together 0"].cached == 650


def test_off_is_off(stock: dict[str, Answer], off_server: Server) -> None:
    answers = transcript(off_server)
    info = off_server.get("/server_info").json()
    # That the plugin is there, and what it does then, is in test_startup::test_which_process_has_which_hooks.
    assert not [key for key in info if "claa" in key] and all(answer.report == {} for answer in answers.values())
    assert essence(answers) == essence(stock)


def test_dense_is_stock(stock: dict[str, Answer], llama_server: Server) -> None:
    assert essence(transcript(llama_server)) == essence(stock)


def test_dense_is_stock_between_pruned_requests(stock: dict[str, Answer], llama_server: Server) -> None:
    answers = transcript(llama_server, lambda prompt: ask(llama_server, Ask(prompt, keep=0.3, new=4)))
    assert all(answer.report["pruned"] is False for answer in answers.values())
    assert essence(answers) == essence(stock)


def test_keeping_everything_is_stock(stock: dict[str, Answer], llama_server: Server) -> None:
    for name in ("chunked", "short"):
        llama_server.flush()
        answer = ask(llama_server, Ask(SINGLE[name], keep=1.0, new=6), VOCAB_SIZE)
        assert answer.report["pruned"] and answer.cached == stock[name].cached == 0
        assert essence({name: answer}) == essence({name: stock[name]})


def test_input_logprobs_beside_pruned_requests(llama_server: Server, llama_reference: ReferenceModel) -> None:
    """Such a request runs dense, and its logits are needed at every prompt token, also in a batch that is pruned."""
    llama_server.flush()
    prompts = [tiny_models.prompt(n, seed=800 + n) for n in (300, 200, 210, 60, 40)]
    with_logprobs = [1, 3]
    answers = llama_server.generate(
        input_ids=prompts,
        sampling_params=[Ask(prompt, keep=0.4).params() for prompt in prompts],
        return_logprob=[i in with_logprobs for i in range(5)],
        logprob_start_len=[0 if i in with_logprobs else -1 for i in range(5)],
    )
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer["meta_info"]["claa"]["pruned"] == (i not in with_logprobs)
        if i in with_logprobs:
            values = [value for value, _, _ in answer["meta_info"]["input_token_logprobs"]]
            expected = llama_reference.dense(prompt[:1], prompt[1:]).logprobs[range(len(prompt) - 1), prompt[1:]]
            assert values[0] is None and torch.tensor(values[1:]).allclose(expected, atol=TOLERANCE, rtol=0)
            assert llama_reference.dense(prompt, answer["output_ids"]).tokens == answer["output_ids"]
        else:
            assert llama_reference.pruned(prompt, answer["output_ids"], 0.4).tokens == answer["output_ids"]
