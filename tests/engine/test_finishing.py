"""Pruned prefixes become dense while the server is idle: what follows is stock's answer, and nothing is in its way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from claa_sglang.finishing.finishing import BUSY_QUIET
from tests import planted, tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Answer, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS, SCHEDULE, SHARED_CHUNK
from tests.engine_server import Server, second_plugin, server
from tests.in_flight import Sent, wait_for
from tests.reference_model import ReferenceModel
from tests.tiny_models import VOCAB_SIZE
from tests.ways_out import ENDLESS, held

pytestmark = pytest.mark.engine

LENGTH = 700
LONG = 2500  # to be caught in the middle
KEEP = 0.2
STEP = 16  # tokens: a prefix takes some forty steps, and requests come between them
FLAGS = (*CLAA_FLAGS, "--claa-finish", "idle", "--claa-finish-chunk", str(STEP), *TINY_FLAGS)
CHUNK = ("--chunked-prefill-size", str(SHARED_CHUNK))
# More than the rounding of one forward, less than any token that is missing or wrong.
ROUNDING = 2e-5

# A step that fails when all of it is computed, and not the first one of a prefix.
FAULTY_PLUGIN = """
def register():
    from claa_sglang.patches import finishing
    from tests import planted

    planted.plant("a step", finishing, "note_dense", lambda pool, pruned, dense, start: start > 0)
"""


@pytest.fixture(scope="module")
def stock(off_server: Server) -> Server:
    """Bit for bit, by `test_dense_is_stock`."""
    return off_server


@pytest.fixture(scope="module")
def finishing(
    fault: Path, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    plugin = second_plugin(tmp_path_factory.mktemp("plugin"), "claa_test_step", FAULTY_PLUGIN)
    env = {**plugin, planted.FILE: str(fault), **STRICT, **ONE_THREAD}
    with server(tiny_model("llama"), *FLAGS, *CHUNK, env=env) as running:
        yield running


@pytest.fixture(scope="module")
def small(tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    """A server with a small pool, which prunes twice."""
    pool = ("--max-total-tokens", "1800")
    with server(tiny_model("llama"), *FLAGS, *CHUNK, *SCHEDULE, *pool, env=STRICT | ONE_THREAD) as running:
        yield running


def stats(running: Server) -> dict[str, Any]:
    return running.get("/server_info").json()["claa"]["finishing"]


def wait_until_finished(running: Server) -> dict[str, Any]:
    wait_for(lambda: not stats(running)["waiting"], "nothing waits to be finished")
    return stats(running)


def wait_until_partly_finished(running: Server, before: float) -> None:
    """Some steps have run since `before` tokens were finished in all, and more are to come."""
    seen: dict[str, Any] = {}

    def has_begun() -> bool:
        seen.update(stats(running))
        return seen["tokens"] > before

    wait_for(has_begun, "a step has run")
    assert seen["waiting"], "all of it was finished at once: the prefix is too short for this test"


def slots_in_use(running: Server) -> int:
    slots = running.get("/server_info").json()["claa"]["late_slots"]
    return slots["total"] - slots["free"]


def first_turn(running: Server, seed: int, length: int = LENGTH, **extra: Any) -> list[int]:
    """A pruned answer over an empty cache. Returns what the next turn begins with: prompt and answer."""
    running.flush()
    asked = Ask(tiny_models.prompt(length, seed=seed), keep=KEEP, new=12, extra=extra)
    answer = ask(running, asked)
    assert answer.report["pruned"] is True
    return asked.prompt + answer.tokens


def next_turn(history: list[int], seed: int, **more: Any) -> Ask:
    return Ask(history + tiny_models.prompt(40, seed=seed), keep=KEEP, **more)


def stocks_answer(stock: Server, history: list[int], asked: Ask) -> tuple[Answer, float]:
    """Stock's answer over the same cached history, and by how much it differs from stock's own without a hit."""
    stock.flush()
    cold = ask(stock, Ask(asked.prompt, new=asked.new), VOCAB_SIZE)
    stock.flush()
    ask(stock, Ask(history[:-1], new=1))  # the last token of an answer is not cached
    hit = ask(stock, Ask(asked.prompt, new=asked.new), VOCAB_SIZE)
    return hit, differ(hit, cold)


def differ(one: Answer, other: Answer) -> float:
    assert one.tokens == other.tokens
    assert isinstance(one.logprobs, Tensor) and isinstance(other.logprobs, Tensor)
    return (one.logprobs - other.logprobs).abs().max().item()


# --- what follows ---


def check_follow_up(finishing: Server, stock: Server) -> None:
    """A question over a finished prefix has stock's answer, over as many cached tokens."""
    history = first_turn(finishing, seed=600)
    before = stats(finishing)
    wait_until_finished(finishing)
    asked = next_turn(history, seed=601)
    answer = ask(finishing, asked, VOCAB_SIZE)
    expected, of_stock = stocks_answer(stock, history, asked)
    assert differ(answer, expected) <= max(of_stock, ROUNDING)
    assert answer.cached == expected.cached == len(history) - 1
    assert answer.report["pruned"] is False and "finished" in answer.report["reason"]
    assert answer.report["finished_tokens"] == (len(history) - 1) // 128 * 128
    after = stats(finishing)
    assert after["finished"] == before["finished"] + 1 and after["dropped"] == before["dropped"]
    check_idle(finishing)


def test_a_follow_up_is_stocks(finishing: Server, stock: Server) -> None:
    check_follow_up(finishing, stock)


def test_a_follow_up_is_stocks_after_two_prunes(small: Server, stock: Server) -> None:
    check_follow_up(small, stock)


def test_only_the_dense_copy_stays(finishing: Server) -> None:
    history = first_turn(finishing, seed=610)
    wait_until_finished(finishing)
    assert slots_in_use(finishing) == len(history) - 1
    dense = ask(finishing, Ask(history, new=1))
    assert dense.cached == len(history) - 1 and dense.report["pruned"] is False
    check_idle(finishing)


def test_two_questions_over_one_text_share_what_is_finished(finishing: Server, llama_reference: ReferenceModel) -> None:
    """The text is finished once, with the question that came last, and its pruned copy goes with the other's."""
    finishing.flush()
    before = stats(finishing)
    text = tiny_models.prompt(LENGTH, seed=620)
    asked = [Ask(text + tiny_models.prompt(40, seed=seed), keep=KEEP) for seed in (621, 622)]
    answers = ask_together(finishing, asked)
    for one, answer in zip(asked, answers, strict=True):
        check(answer, llama_reference.pruned(one.prompt, answer.tokens, KEEP))
    after = wait_until_finished(finishing)
    whole = LENGTH + 2 * (40 + asked[0].new - 1)
    assert after["tokens"] - before["tokens"] == whole and after["finished"] == before["finished"] + 2
    assert slots_in_use(finishing) == whole
    for one in asked:
        assert ask(finishing, Ask(one.prompt + [1], new=1)).cached == len(one.prompt)
    check_idle(finishing)


def test_a_prefix_is_finished_for_those_who_share_it_alone(finishing: Server) -> None:
    history = first_turn(finishing, seed=630, extra_key="tenant", cache_salt="pepper")
    wait_until_finished(finishing)
    asked = Ask(history + [5], new=1)
    assert ask(finishing, asked).cached == 0
    assert ask(finishing, Ask(asked.prompt, new=1, extra={"extra_key": "tenant"})).cached == 0
    theirs = {"extra_key": "tenant", "cache_salt": "pepper"}
    assert ask(finishing, Ask(asked.prompt, new=1, extra=theirs)).cached == len(history) - 1
    check_idle(finishing)


def test_a_request_may_leave_its_prefix_pruned(finishing: Server) -> None:
    finishing.flush()
    before = stats(finishing)
    prompt = tiny_models.prompt(LENGTH, seed=640)
    claa = {"keep_rate": KEEP, "finish": False}
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True, "custom_params": {"claa": claa}}
    finishing.generate(input_ids=prompt, sampling_params=params)
    time.sleep(2 * BUSY_QUIET)
    assert stats(finishing) == before
    assert ask(finishing, Ask(prompt + [5] * 40, keep=KEEP)).report["pruned"] is True
    check_idle(finishing)


# --- never in the way ---


def test_requests_between_the_steps_are_right_and_the_prefix_is_finished(
    finishing: Server, llama_reference: ReferenceModel
) -> None:
    history = first_turn(finishing, seed=650)
    before = stats(finishing)
    for seed in range(651, 657):
        asked = Ask(tiny_models.prompt(60, seed=seed), keep=KEEP if seed % 2 else None)
        answer = ask(finishing, asked)
        if asked.keep is None:
            check(answer, llama_reference.dense(asked.prompt, answer.tokens))
        else:
            check(answer, llama_reference.pruned(asked.prompt, answer.tokens, KEEP))
        gone = Sent(finishing, Ask(tiny_models.prompt(90, seed=seed + 20), keep=KEEP, new=4000), rid=f"gone-{seed}")
        time.sleep(0.05 * (seed - 650))  # any moment will do
        gone.hang_up()
    wait_for(lambda: not held(finishing), "those who hung up are gone")
    after = wait_until_finished(finishing)
    assert after["finished"] == before["finished"] + 1
    assert ask(finishing, next_turn(history, seed=659)).cached == len(history) - 1
    check_idle(finishing)


def test_a_partly_finished_prefix_is_a_shorter_dense_one(finishing: Server, llama_reference: ReferenceModel) -> None:
    finishing.flush()
    before = stats(finishing)["tokens"]
    history = first_turn(finishing, seed=660, length=LONG)
    wait_until_partly_finished(finishing, before)
    asked = next_turn(history, seed=661)
    dense = ask(finishing, Ask(asked.prompt))
    check(dense, llama_reference.dense(asked.prompt, dense.tokens))
    assert 0 < dense.cached < len(history) - 1 and dense.cached % STEP == 0
    wait_until_finished(finishing)
    check_idle(finishing)


def test_a_turn_that_comes_too_early_is_finished_with_the_longer_prefix(
    finishing: Server, llama_reference: ReferenceModel
) -> None:
    before = stats(finishing)
    history = first_turn(finishing, seed=670)
    asked = next_turn(history, seed=671)
    early = ask(finishing, asked)  # at once, before any step
    assert early.report["pruned"] is True
    check(early, llama_reference.pruned(asked.prompt, early.tokens, KEEP))
    after = wait_until_finished(finishing)
    longer = asked.prompt + early.tokens
    assert after["finished"] == before["finished"] + 1, "the longer prefix waits in place of the shorter one"
    answer = ask(finishing, next_turn(longer, seed=672))
    assert answer.cached == len(longer) - 1 and answer.report["pruned"] is False
    check_idle(finishing)


def test_nothing_is_finished_while_somebody_decodes(finishing: Server) -> None:
    finishing.flush()
    before = stats(finishing)["tokens"]
    decoding = Sent(finishing, Ask(tiny_models.prompt(60, seed=675), new=ENDLESS), rid="decoding")
    wait_for(lambda: slots_in_use(finishing) > 60, "it decodes")
    asked = Ask(tiny_models.prompt(LENGTH, seed=676), keep=KEEP)
    assert ask(finishing, asked).report["pruned"] is True
    for _ in range(5):
        time.sleep(0.5 * BUSY_QUIET)
        assert stats(finishing)["waiting"] == 1 and stats(finishing)["tokens"] == before
    decoding.hang_up()
    assert wait_until_finished(finishing)["tokens"] == before + LENGTH + asked.new - 1
    check_idle(finishing)


def test_new_weights_leave_nothing_to_finish(finishing: Server, tiny_model: Callable[[str], Path]) -> None:
    before = stats(finishing)["tokens"]
    history = first_turn(finishing, seed=678, length=LONG)
    wait_until_partly_finished(finishing, before)
    loaded = finishing.post("/update_weights_from_disk", {"model_path": str(tiny_model("llama"))})
    assert loaded.status_code == 200, loaded.text
    assert stats(finishing)["waiting"] == 0
    assert ask(finishing, Ask(history, new=1)).cached == 0
    check_idle(finishing)


def test_an_emptied_cache_has_nothing_to_finish(finishing: Server) -> None:
    before = stats(finishing)["tokens"]
    first_turn(finishing, seed=680, length=LONG)
    wait_until_partly_finished(finishing, before)
    finishing.flush()
    assert stats(finishing)["waiting"] == 0
    check_idle(finishing)
    assert slots_in_use(finishing) == 0


def test_a_step_that_fails_leaves_the_prefix_pruned(
    finishing: Server, fault: Path, llama_reference: ReferenceModel
) -> None:
    before = stats(finishing)
    fault.write_text("a step")
    try:
        history = first_turn(finishing, seed=690)
        wait_for(lambda: stats(finishing)["dropped"] > before["dropped"], "the prefix is given up")
    finally:
        fault.write_text("")
    assert "planted a step" in finishing.log()
    assert slots_in_use(finishing) == len(history) - 1 + STEP, "one step was good, the next gave its slots back"
    asked = next_turn(history, seed=691)
    answer = ask(finishing, asked)
    assert answer.report["pruned"] is True and answer.cached >= len(history) - 1 - 32
    check(answer, llama_reference.pruned(asked.prompt, answer.tokens, KEEP))
    wait_until_finished(finishing)
    check_idle(finishing)


# --- memory ---


def test_finishing_takes_free_slots_and_older_prefixes_and_else_gives_up(small: Server) -> None:
    before = stats(small)
    older = first_turn(small, seed=700, length=600)
    wait_until_finished(small)
    # 600 older dense tokens, 600 pruned ones, 600 to come: the older prefix has to make room.
    asked = Ask(tiny_models.prompt(600, seed=701), keep=KEEP, new=12)
    newer = asked.prompt + ask(small, asked).tokens
    after = wait_until_finished(small)
    assert after["finished"] == before["finished"] + 2 and after["dropped"] == before["dropped"]
    assert ask(small, Ask(newer + [5], new=1)).cached == len(newer) - 1
    assert ask(small, Ask(older + [5], new=1)).cached < len(older) - 1
    # A prefix that does not fit twice is given up, and what was computed of it serves.
    history = first_turn(small, seed=702, length=1200)
    after = wait_until_finished(small)
    assert after["finished"] == before["finished"] + 2 and after["dropped"] == before["dropped"] + 1
    answer = ask(small, Ask(history, new=1))
    assert 0 < answer.cached < len(history) - 1
    check_idle(small)
