"""Prompts that would stop SGLang's scheduler are refused before they reach it; no other prompt is."""

from __future__ import annotations

from typing import Any

import pytest

from claa_sglang.patches import tokenizer
from claa_sglang.requests.options import RequestError

VOCAB_SIZE = 512


@pytest.fixture
def manager() -> Any:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    made = TokenizerManager.__new__(TokenizerManager)
    made.preferred_sampling_params = None
    made.model_config = ModelConfig.__new__(ModelConfig)
    made.model_config.vocab_size = VOCAB_SIZE
    return made


def check(manager: Any, input_ids: Any, /, **fields: Any) -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    body = {"input_ids": input_ids, "sampling_params": {}, **fields}
    tokenizer.check_request(manager, GenerateReqInput(**body), input_ids)


@pytest.mark.parametrize("input_ids", [[0], [511], [0, 511] * 50, list(range(512)), None], ids=lambda ids: str(ids)[:9])
def test_a_prompt_of_the_vocabulary_is_let_through(manager: Any, input_ids: Any) -> None:
    check(manager, input_ids)


@pytest.mark.parametrize("bad", [-1, 512, -(2**40), 2**31, 2**63 - 1])
@pytest.mark.parametrize("others", [0, 100])
def test_an_id_outside_the_vocabulary_is_refused(manager: Any, bad: int, others: int) -> None:
    with pytest.raises(ValueError, match=f"input_ids: {bad} is no token of this model: its ids are 0 to 511"):
        check(manager, [5] * others + [bad] + [7] * others)


def test_a_prompt_without_tokens_is_refused(manager: Any) -> None:
    for fields in ({}, {"session_params": {}}, {"input_ids": None, "text": ""}):
        with pytest.raises(ValueError, match="the prompt is empty"):
            check(manager, [], **fields)


@pytest.mark.parametrize("input_ids", [1, [[1, 2]], [[1], [2]], [1, [2]], ["1"], [None, 1]], ids=str)
def test_ids_of_another_shape_than_the_texts_are_refused(manager: Any, input_ids: Any) -> None:
    """What SGLang makes of `{"text": ["a", "b"], "input_ids": [1, 2]}`, and of the reverse."""
    with pytest.raises(ValueError, match="one list of token ids for each prompt"):
        check(manager, input_ids)


def test_what_others_check_is_left_to_them(manager: Any) -> None:
    check(manager, [], session_params={"id": "s"})  # the session's history is in the scheduler
    check(manager, [-1], input_embeds=[[0.0]])  # ids that stand for embeddings
    check(manager, [512], input_ids=None, text="x")  # a tokenizer's own


def test_bad_options_are_named_first(manager: Any) -> None:
    with pytest.raises(RequestError, match="keep_rate"):
        check(manager, [-1], sampling_params={"custom_params": {"claa": {"keep_rate": 2}}})
