"""Requests that share a prefix: private late state, separate namespaces, and turns of one conversation."""

from __future__ import annotations

from typing import Any

import pytest

from tests import tiny_models
from tests.answers import Answer, Ask, ask, ask_together, check, check_idle
from tests.engine_server import Server
from tests.reference_model import ReferenceModel
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.engine

PREFIX = tiny_models.prompt(600, seed=10)
WINDOW = 32


def question(seed: int, length: int = 40) -> list[int]:
    return tiny_models.prompt(length, seed=seed)


def cold(running: Server, asked: Ask, **more: Any) -> Answer:
    running.flush()
    return ask(running, asked, **more)


# --- isolation ---


def test_two_questions_at_once_get_the_answers_they_get_alone(
    llama_server: Server, llama_reference: ReferenceModel
) -> None:
    asked = [Ask(PREFIX + question(11), keep=0.2, new=16), Ask(PREFIX + question(12), keep=0.5, new=16)]
    alone = [cold(llama_server, one) for one in asked]
    for one, answer in zip(asked, alone, strict=True):
        assert one.keep is not None
        check(answer, llama_reference.pruned(one.prompt, answer.tokens, one.keep))
    assert alone[0].kept != alone[1].kept
    for warm in (False, True):
        llama_server.flush()
        if warm:
            ask(llama_server, Ask(PREFIX + question(13), keep=0.3))
        together = ask_together(llama_server, asked)
        assert [(a.kept, a.tokens) for a in together] == [(a.kept, a.tokens) for a in alone]
        if warm:
            assert all(a.cached >= len(PREFIX) for a in together)


def test_many_keep_rates_at_once_over_one_cached_prefix(llama_server: Server) -> None:
    asked = [Ask(PREFIX + question(20 + i), keep=i / 10, new=12) for i in range(1, 8)]
    alone = [cold(llama_server, one) for one in asked]
    llama_server.flush()
    ask(llama_server, Ask(PREFIX, keep=0.3))
    together = ask_together(llama_server, [*asked, Ask(PREFIX + question(28), new=12)])
    assert [(a.kept, a.tokens) for a in together[:-1]] == [(a.kept, a.tokens) for a in alone]


def test_pruned_and_dense_never_hit_each_other(llama_server: Server, llama_reference: ReferenceModel) -> None:
    prompt = PREFIX + question(31)
    dense, pruned = Ask(prompt), Ask(prompt, keep=0.4)
    hits = {}
    llama_server.flush()
    for name, one in {"dense": dense, "pruned": pruned, "dense again": dense, "pruned again": pruned}.items():
        answer = ask(llama_server, one, VOCAB_SIZE)
        hits[name] = answer.cached
        if one.keep is None:
            check(answer, llama_reference.dense(prompt, answer.tokens))
        else:
            check(answer, llama_reference.pruned(prompt, answer.tokens, one.keep))
    assert hits == {
        "dense": 0,
        "pruned": 0,
        "dense again": len(prompt) - 1,
        "pruned again": len(prompt) - WINDOW,  # the window is computed again, its queries rank
    }


def test_a_client_s_keys_still_separate_and_never_lead_across(
    llama_server: Server, llama_reference: ReferenceModel
) -> None:
    prompt = PREFIX + question(32)
    namespace = llama_server.get("/server_info").json()["claa"]["config"]["namespace"]
    expected = llama_reference.pruned(prompt, ask(llama_server, Ask(prompt, keep=0.3)).tokens, 0.3)
    llama_server.flush()
    ask(llama_server, Ask(prompt, keep=0.3))
    ask(llama_server, Ask(prompt, keep=0.3, extra={"extra_key": "tenant"}))
    for extra in ({"extra_key": "other"}, {"cache_salt": "salt"}):
        first = ask(llama_server, Ask(prompt, keep=0.3, extra=extra))
        again = ask(llama_server, Ask(prompt, keep=0.3, extra=extra))
        assert (first.cached, again.cached) == (0, len(prompt) - WINDOW), extra
        check(first, expected)
        check(again, expected)
    for key in (namespace, f"{namespace}|tenant"):
        stranger = ask(llama_server, Ask(prompt, extra={"extra_key": key}), VOCAB_SIZE)
        assert stranger.cached == 0, key
        check(stranger, llama_reference.dense(prompt, stranger.tokens))


# --- multi-turn ---


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_each_turn_ranks_everything_and_reuses_the_answers_before(
    llama_server: Server, llama_reference: ReferenceModel, keep: float
) -> None:
    conversation = PREFIX + question(41)
    llama_server.flush()
    turns, answers, kept_of_answers = [], [], 0
    for turn in range(3):
        before = 0 if turn == 0 else len(turns[-1].prompt) + len(answers[-1].tokens)
        turns.append(Ask(conversation, keep=keep, new=24))
        answers.append(ask(llama_server, turns[-1], VOCAB_SIZE))
        # The last token of an answer was never fed to the model, so it has no KV to reuse.
        assert answers[-1].cached >= before - 1
        conversation = conversation + answers[-1].tokens + question(42 + turn)
    for one, answer in zip(turns, answers, strict=True):
        check(answer, llama_reference.pruned(one.prompt, answer.tokens, keep))
        again = cold(llama_server, one)
        assert again.cached == 0 and (again.kept, again.tokens) == (answer.kept, answer.tokens)
    first = len(turns[0].prompt)
    assert answers[1].kept is not None
    kept_of_answers = sum(first <= position < first + 24 for position in answers[1].kept)
    # Else boundary states of generated tokens are not tested here.
    assert kept_of_answers > 24 * keep / 3


def test_a_dense_turn_after_a_pruned_one(llama_server: Server, llama_reference: ReferenceModel) -> None:
    """What the pruned turn left in its slots is not KV that a dense request may read."""
    prompt = PREFIX + question(51)
    llama_server.flush()
    first = ask(llama_server, Ask(prompt, keep=0.2))
    second = prompt + first.tokens + question(52)
    answer = ask(llama_server, Ask(second), VOCAB_SIZE)
    assert answer.cached == 0
    check(answer, llama_reference.dense(second, answer.tokens))


def test_nothing_is_left(llama_server: Server) -> None:
    check_idle(llama_server)
