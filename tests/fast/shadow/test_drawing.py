"""Which requests are drawn, on SGLang's own request record."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.shadow.drawing import RULES, Draws, Facts, can_be_drawn
from tests.conftest import ROOT
from tests.fast.requests.test_dense_rules import received

# For each rule, what a request asks for: sampling parameters, fields of the record, what is known beside it.
CASES: tuple[tuple[str, dict[str, Any], dict[str, Any], dict[str, bool]], ...] = (
    ("penalties", {"frequency_penalty": 0.1}, {}, {}),
    ("penalties", {"presence_penalty": -0.1}, {}, {}),
    ("penalties", {"repetition_penalty": 1.1}, {}, {}),
    ("`logit_bias`", {"logit_bias": {"3": 1.0}}, {}, {}),
    ("a schema, expression or grammar", {"json_schema": "{}"}, {}, {}),
    ("a schema, expression or grammar", {"regex": "a+"}, {}, {}),
    ("a schema, expression or grammar", {"ebnf": "root ::= 'a'"}, {}, {}),
    ("a schema, expression or grammar", {"structural_tag": "{}"}, {}, {}),
    ("`min_new_tokens`", {"min_new_tokens": 1}, {}, {}),
    ("a custom logit processor", {}, {"custom_logit_processor": "x"}, {}),
    ("a thinking budget", {"custom_params": {"thinking_budget": 3}}, {}, {}),
    ("a watermark", {"watermark": {"enabled": True}}, {}, {}),
    ("`--enable-watermark`, `--enable-strict-thinking`", {}, {}, {"server_steers": True}),
    ("several samples", {"n": 2}, {}, {}),
    ("beam search", {"beam_width": 2}, {}, {}),
    ("input embeddings", {}, {"input_embeds": [[0.0]]}, {}),
    ("images, audio, video", {}, {"mm_inputs": object()}, {}),
    ("a session", {}, {"session_params": object()}, {}),
    ("LoRA", {}, {"lora_id": "x"}, {}),
    ("`no_logs`", {}, {}, {"no_logs": True}),
)
NOTHING = {"no_logs": False, "server_steers": False}


def facts(params: dict[str, Any], fields: dict[str, Any], known: dict[str, bool]) -> Facts:
    return Facts(received(params=params, **fields), **{**NOTHING, **known})


@pytest.mark.parametrize(("asks", "params", "fields", "known"), CASES)
def test_no_rule_but_one_keeps_a_request_from_being_drawn(
    asks: str, params: dict[str, Any], fields: dict[str, Any], known: dict[str, bool]
) -> None:
    given = facts(params, fields, known)
    assert [rule.asks for rule in RULES if rule.applies(given)] == [asks] and not can_be_drawn(given)


def test_every_rule_has_a_case_and_a_word_in_the_document() -> None:
    assert {rule.asks for rule in RULES} == {asks for asks, *_ in CASES}
    page = (ROOT / "docs" / "shadow.md").read_text()
    assert [rule.asks for rule in RULES if rule.asks not in page] == []


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "sampling_seed": 1},
        {"ignore_eos": True, "stop": ["x"], "stop_token_ids": [3], "custom_params": {"claa": {"keep_rate": 0.1}}},
        {"max_new_tokens": None, "repetition_penalty": None, "n": None, "beam_width": 1, "json_schema": ""},
    ],
)
def test_what_leaves_the_model_s_probabilities_as_they_are_is_drawn(params: dict[str, Any]) -> None:
    assert can_be_drawn(facts(params, {"return_logprob": True, "stream": True}, {}))


@given(st.floats(0, 1), st.integers())
def test_draws_are_those_of_their_seed(rate: float, seed: int) -> None:
    first, second = Draws(rate, seed), Draws(rate, seed)
    assert [first.draw() for _ in range(50)] == [second.draw() for _ in range(50)]


@given(st.integers())
def test_nothing_is_drawn_at_0_and_everything_at_1(seed: int) -> None:
    never, always = Draws(0.0, seed), Draws(1.0, seed)
    assert not any(never.draw() for _ in range(100)) and all(always.draw() for _ in range(100))


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_the_share_is_the_rate(rate: float) -> None:
    draws = Draws(rate, 5)
    count, spread = 20000, 4 * (rate * (1 - rate) / 20000) ** 0.5
    assert abs(sum(draws.draw() for _ in range(count)) / count - rate) < spread
