"""A late prefill longer than a chunk takes several steps: no layer sees more rows than a stock chunk has.

With one prune and with two: then rows wait between the first and the second as well. A second SGLang plugin, installed
for the test on PYTHONPATH, writes down the rows of every prefill at every level.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Answer, Ask, ask, ask_together, check, check_idle
from tests.engine.conftest import CLAA_FLAGS, SCHEDULE
from tests.engine_server import Server, second_plugin, server
from tests.explained import check_explained
from tests.reference_model import ReferenceModel

pytestmark = pytest.mark.engine

CHUNK = 96
RECORDER = """
import json, os


def register():
    from claa_sglang.patches import forward_batch

    original = forward_batch.plan_extend

    def recorded(*args, **kwargs):
        plan = original(*args, **kwargs)
        if plan is not None:
            with open(os.environ["CLAA_TEST_ROWS"], "a") as file:
                file.write(json.dumps([plan.rows(level) for level in range(len(plan.levels))]) + "\\n")
        return plan

    forward_batch.plan_extend = recorded
"""


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "rows.jsonl"


@pytest.fixture(scope="module")
def running(
    prunes: int, rows_file: Path, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    plugin = second_plugin(tmp_path_factory.mktemp("recorder"), "claa_test_rows", RECORDER)
    env = {**plugin, **STRICT, **ONE_THREAD, "CLAA_TEST_ROWS": str(rows_file)}
    schedule = SCHEDULE if prunes == 2 else ()
    flags = (*CLAA_FLAGS, "--claa-allow-explain", *schedule, *TINY_FLAGS, "--chunked-prefill-size", str(CHUNK))
    with server(tiny_model("llama"), *flags, env=env) as started:
        yield started


@pytest.fixture
def rows(rows_file: Path) -> Callable[[], list[list[int]]]:
    """Rows of the prefills since the test began: one list per forward, of its rows at every level."""
    rows_file.write_text("")
    return lambda: [json.loads(line) for line in rows_file.read_text().splitlines()]


def right(one: Ask, answer: Answer, reference: ReferenceModel) -> None:
    if one.keep is None:
        check(answer, reference.dense(one.prompt, answer.tokens))
    else:
        check(answer, reference.pruned(one.prompt, answer.tokens, one.keep))


@pytest.mark.parametrize("keep", [0.15, 0.5, 0.9, 1.0])
def test_alone(
    keep: float, prunes: int, running: Server, reference: ReferenceModel, rows: Callable[[], list[list[int]]]
) -> None:
    running.flush()
    prompt = tiny_models.prompt(700, seed=200)
    for cached in (0, 700 - 32):  # cold, and all but the window
        answer = ask(running, Ask(prompt, keep), vocabulary=tiny_models.VOCAB_SIZE)
        check(answer, reference.pruned(prompt, answer.tokens, keep))
        assert answer.cached == cached
    assert max(max(levels) for levels in rows()) <= CHUNK
    for level, kept in enumerate(answer.kept_by_step, start=1):
        late = [levels[level] for levels in rows()]
        assert sum(late) == 2 * len(kept) and sum(n > 0 for n in late) == 2 * -(-len(kept) // CHUNK)
    assert len(answer.kept_by_step) == prunes and len(answer.kept_by_step[0]) == int(keep * 700)
    check_idle(running)


def test_explained(running: Server, reference: ReferenceModel) -> None:
    """The scores of every prune, as it was ranked in a step between others; cold and over a hit."""
    running.flush()
    asked = Ask(tiny_models.prompt(700, seed=205), 0.5, new=2, options={"explain": True, "explain_window": 80})
    for cached in (0, 700 - 80):
        answer = ask(running, asked)
        expected = reference.pruned(asked.prompt, answer.tokens, 0.5)
        check(answer, expected)
        check_explained(answer.report, expected)
        assert answer.cached == cached
    plain = ask(running, replace(asked, options={}))
    assert (plain.tokens, plain.kept_by_step) == (answer.tokens, answer.kept_by_step)


def test_together(running: Server, reference: ReferenceModel, rows: Callable[[], list[list[int]]]) -> None:
    """Long and short, pruned and dense; twice, so that the second time hits prefixes."""
    prefix = tiny_models.prompt(250, seed=210)
    asked = [
        Ask(prefix + tiny_models.prompt(300, seed=211), 0.9),
        Ask(tiny_models.prompt(30, seed=212)),
        Ask(tiny_models.prompt(40, seed=213), 1.0),
        Ask(prefix + tiny_models.prompt(40, seed=214), 0.5),
        Ask(tiny_models.prompt(260, seed=215)),
        Ask(tiny_models.prompt(500, seed=216), 0.2),
        Ask(tiny_models.prompt(90, seed=217), 1.0),
        Ask(tiny_models.prompt(95, seed=218), 0.99),
    ]
    for _ in range(2):
        for one, answer in zip(asked, ask_together(running, asked), strict=True):
            right(one, answer, reference)
    assert max(max(levels) for levels in rows()) <= CHUNK
    check_idle(running)


def test_while_others_decode(running: Server, reference: ReferenceModel) -> None:
    """Decoding requests wait for the parts, and read nothing of them."""
    decoding = [Ask(tiny_models.prompt(60 + i, seed=220 + i), 0.5 if i % 2 else None, new=150) for i in range(4)]
    answers: dict[int, Answer] = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: ask(running, decoding[i])}))
        for i in range(len(decoding))
    ]
    for thread in threads:
        thread.start()
    long = Ask(tiny_models.prompt(800, seed=230), 0.95)
    right(long, ask(running, long), reference)
    for thread in threads:
        thread.join()
    for i, one in enumerate(decoding):
        right(one, answers[i], reference)
    check_idle(running)
