"""The same request keeps the same positions and gives the same tokens, whatever is cached, chunked or beside it.

Every answer is held against the reference, which knows nothing of caches, chunks and batches; so servers with different
chunk sizes agree with each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Answer, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS, SHARED_CHUNK
from tests.engine_server import Server, server
from tests.reference_model import Expected, ReferenceModel

pytestmark = pytest.mark.engine

NONE = -1  # no chunked prefill
WINDOW = 32
TARGET = Ask(tiny_models.prompt(1025, seed=61), keep=0.15, new=12)
# What a batch may hold beside it: kept a little and a lot, dense, short, shorter than the window, of its own prefix.
COMPANY = (
    Ask(tiny_models.prompt(700, seed=62), keep=0.5, new=20),
    Ask(tiny_models.prompt(400, seed=63), new=9),
    Ask(tiny_models.prompt(44, seed=64), keep=0.9, new=16),
    Ask(tiny_models.prompt(5, seed=65), keep=0.3, new=30),
    Ask(TARGET.prompt[:600] + tiny_models.prompt(100, seed=66), keep=0.3, new=5),
    Ask(TARGET.prompt, new=7),
    Ask(tiny_models.prompt(260, seed=67), keep=1.0, new=14),
)


@pytest.fixture(scope="module", params=[64, SHARED_CHUNK, NONE], ids=["chunk 64", "chunk 256", "no chunks"])
def chunked(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[tuple[Server, int]]:
    """A server and its chunk size."""
    if request.param == SHARED_CHUNK:
        yield request.getfixturevalue("llama_server"), SHARED_CHUNK
        return
    chunk = ("--chunked-prefill-size", str(request.param))
    with server(tiny_model("llama"), *CLAA_FLAGS, *TINY_FLAGS, *chunk, env=STRICT | ONE_THREAD) as running:
        yield running, request.param


def expected(reference: ReferenceModel, asked: Ask, answer: Answer) -> Expected:
    """The reference's view of an answer, dense or pruned as the request ran."""
    if not answer.report["pruned"]:
        return reference.dense(asked.prompt, answer.tokens)
    assert asked.keep is not None
    return reference.pruned(asked.prompt, answer.tokens, asked.keep)


def test_cold_and_warm(chunked: tuple[Server, int], llama_reference: ReferenceModel) -> None:
    running, _ = chunked
    running.flush()
    cold = ask(running, TARGET)
    check(cold, expected(llama_reference, TARGET, cold))
    warm = ask(running, TARGET)
    running.flush()
    ask(running, COMPANY[4])  # another question over the first 600 tokens
    partly = ask(running, TARGET)
    for answer, cached in ((cold, 0), (warm, 1025 - WINDOW), (partly, 600)):
        assert answer.cached == cached
        assert (answer.kept, answer.tokens) == (cold.kept, cold.tokens)


@pytest.mark.parametrize("order", ["first", "last"])
def test_in_a_batch_of_eight(chunked: tuple[Server, int], llama_reference: ReferenceModel, order: str) -> None:
    running, _ = chunked
    running.flush()
    asked = [TARGET, *COMPANY] if order == "first" else [*COMPANY, TARGET]
    for one, answer in zip(asked, ask_together(running, asked), strict=True):
        check(answer, expected(llama_reference, one, answer))


def test_arriving_while_others_decode(chunked: tuple[Server, int], llama_reference: ReferenceModel) -> None:
    """Prefills of pruned requests between decode steps of pruned and dense ones."""
    running, _ = chunked
    running.flush()
    asked = [Ask(one.prompt, one.keep, new=48) for one in COMPANY] + [TARGET]
    answers: dict[int, Answer] = {}

    def run(index: int) -> None:
        answers[index] = ask(running, asked[index])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(asked))]
    for i, thread in enumerate(threads):
        thread.start()
        thread.join(0.05 * i)
    for thread in threads:
        thread.join()
    for index, one in enumerate(asked):
        check(answers[index], expected(llama_reference, one, answers[index]))


def lengths(chunk: int) -> list[int]:
    """Prompt lengths whose last chunk would be shorter than the window, or just not, if chunks were cut blindly."""
    size = SHARED_CHUNK if chunk == NONE else chunk
    extras = (0, 1, 2, 7, WINDOW // 2, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1)
    return [k * size + extra for k in (1, 3) for extra in extras]


def test_last_chunks_that_would_be_too_short(chunked: tuple[Server, int], llama_reference: ReferenceModel) -> None:
    running, chunk = chunked
    running.flush()
    for length in lengths(chunk):
        asked = Ask(tiny_models.prompt(length, seed=1000 + length), keep=0.3, new=2)
        answer = ask(running, asked)
        check(answer, expected(llama_reference, asked, answer))


def test_several_shortened_prompts_in_one_step(chunked: tuple[Server, int], llama_reference: ReferenceModel) -> None:
    running, chunk = chunked
    running.flush()
    asked = [Ask(tiny_models.prompt(n, seed=2000 + n), keep=0.3, new=4) for n in lengths(chunk)]
    # Short ones between them leave every step another remainder of its budget.
    asked[3:3] = [Ask(tiny_models.prompt(n, seed=3000 + n), keep=0.5, new=3) for n in (WINDOW + 1, 50, 57, 61)]
    for one, answer in zip(asked, ask_together(running, asked), strict=True):
        check(answer, expected(llama_reference, one, answer))


@pytest.mark.parametrize("keep", [0.05, 0.5])
@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 80, 1025])
def test_odd_sizes(chunked: tuple[Server, int], llama_reference: ReferenceModel, length: int, keep: float) -> None:
    running, _ = chunked
    running.flush()  # the shorter prompts are prefixes of the longer ones
    asked = Ask(tiny_models.prompt(length, seed=70), keep=keep, new=4)
    answer = ask(running, asked)
    assert answer.report["pruned"] == (length > WINDOW)
    check(answer, expected(llama_reference, asked, answer))
    if answer.kept is not None:
        assert len(answer.kept) == max(int(keep * length), WINDOW)
        assert answer.kept[-WINDOW:] == list(range(length - WINDOW, length))
        assert (answer.kept[0] == 0) == (len(answer.kept) > WINDOW)


def test_nothing_is_left(chunked: tuple[Server, int]) -> None:
    check_idle(chunked[0])
