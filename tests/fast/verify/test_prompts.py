"""Prompts that need the model's own tokenizer, and texts that do without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from claa_sglang.verify.claims import needles_found
from claa_sglang.verify.client import DENSE, Answer
from claa_sglang.verify.error import VerifyError
from claa_sglang.verify.needles import task_needles, tokenizer_at_hand
from claa_sglang.verify.prompts import Ids, Needle, Texts

TOKENS = 1280


@pytest.fixture(scope="module")
def tokenizer(small_model_path: Path) -> Any:
    found = tokenizer_at_hand(None, {"tokenizer_path": str(small_model_path)})
    assert found is not None
    return found


def test_needles_of_the_tasks(tokenizer: Any) -> None:
    """The same in every run, as their cache keys make them cold."""
    needles = task_needles(tokenizer, 300, 2)
    assert needles == task_needles(tokenizer, 300, 2)
    for needle in needles:
        ids = needle.prompt["input_ids"]
        (number,) = needle.answers
        assert 290 <= len(ids) <= 300 and number in tokenizer.decode(ids)
        assert needle.room > len(tokenizer(number).input_ids)


def test_none_can_be_made_without_a_template_or_in_too_few_tokens(tokenizer: Any) -> None:
    assert task_needles(tokenizer, 20, 2) == []
    assert task_needles(object(), 300, 2) == []


class Server:
    """Answers with token ids alone, right if it is dense."""

    def __init__(self, tokenizer: Any, number: str):
        self._said = {dense: tokenizer(text).input_ids for dense, text in ((True, f" {number}."), (False, " none"))}

    def ask(self, prompt: Any, claa: Any, room: int, key: str, **_: Any) -> Answer:
        return Answer(None, self._said[claa is DENSE], [], [], {"pruned": claa is not DENSE}, 300, 0, 0.0, 1.0)


class Key:
    def new(self) -> str:
        return "key"


def test_answers_without_a_text_are_decoded(tokenizer: Any) -> None:
    needle = Needle({"input_ids": [1]}, ["123456"], 8)
    server: Any = Server(tokenizer, "123456")
    keys: Any = Key()
    claim = needles_found(server, keys, [needle], tokenizer, "prompts")
    assert claim.ok is False and claim.data["needles"][0]["found"] == [True, False]
    assert "123456" in claim.more[0] and "none" in claim.more[0]


def test_a_tokenizer_that_is_not_here() -> None:
    assert tokenizer_at_hand(None, {"tokenizer_path": "somebody/model"}) is None
    with pytest.raises(VerifyError, match="--tokenizer /nowhere cannot be loaded: it has none of"):
        tokenizer_at_hand("/nowhere", {})


def test_texts_are_as_long_as_a_sample_tells(tokenizer: Any) -> None:
    texts = Texts("run")
    texts.per_word = len(tokenizer(texts.sample(600)["text"]).input_ids) / 600
    prompts = [prompt for _ in range(10) for prompt in texts.pair(TOKENS)]
    prompts += [needle.prompt for needle in texts.needles(TOKENS, 10)]
    lengths = [len(tokenizer(prompt["text"]).input_ids) for prompt in prompts]
    assert 0.85 * TOKENS < min(lengths) and max(lengths) < 1.15 * TOKENS, lengths
    assert len({prompt["text"].split()[0] for prompt in prompts}) == 20


def test_two_questions_share_all_but_their_ends() -> None:
    ids, texts = Ids(1000, "run").pair(100), Texts("run").pair(200)
    first, second = (prompt["input_ids"] for prompt in ids)
    assert first[:76] == second[:76] and first[76:] != second[76:] and len(first) == len(second) == 100
    first, second = (prompt["text"].partition("\n\n") for prompt in texts)
    assert first[0] == second[0] and first[2] != second[2]
