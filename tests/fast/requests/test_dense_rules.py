"""Which requests run dense and why, on SGLang's own request record."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest

from claa_sglang.config.config import ClaaConfig
from claa_sglang.requests.dense_rules import RULES, Facts, dense_reason
from claa_sglang.requests.options import parse_options
from tests.fast.states import CONFIG


def received(tokens: int = 80, *, params: dict | None = None, **fields: Any) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    values = {
        "rid": "r",
        "input_text": None,
        "input_ids": array("q", range(tokens)),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": SamplingParams(**{"max_new_tokens": 4, **(params or {})}),
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
    }
    return TokenizedGenerateReqInput(**{**values, **fields})


def facts(
    tokens: int = 80,
    config: ClaaConfig = CONFIG,
    options: dict | None = None,
    session_cache: bool = False,
    **fields: Any,
) -> Facts:
    return Facts(parse_options({"claa": options or {}}), config, received(tokens, **fields), tokens, session_cache)


def reason(tokens: int = 80, config: ClaaConfig = CONFIG, options: dict | None = None, **fields: Any) -> str | None:
    return dense_reason(facts(tokens, config, options, **fields))


def test_a_plain_long_prompt_is_pruned() -> None:
    assert reason() is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        pytest.param({"options": {"enabled": False}}, "disabled", id="opted out"),
        pytest.param({"tokens": 31}, "shorter than 32", id="short"),
        pytest.param({"return_logprob": True, "logprob_start_len": 0}, "input logprobs", id="all logprobs"),
        pytest.param({"return_logprob": True, "logprob_start_len": 79}, "input logprobs", id="the last logprob"),
        pytest.param({"return_logprob": True, "logprob_start_len": -2}, "input logprobs", id="negative start"),
        pytest.param(
            {"return_logprob": True, "logprob_start_len": 0, "token_ids_logprob": [1]},
            "input logprobs",
            id="token id logprobs",
        ),
        pytest.param({"input_embeds": [[0.0]]}, "embeddings", id="input_embeds"),
        pytest.param({"return_hidden_states": True}, "hidden states", id="hidden states"),
        pytest.param({"return_hidden_states": "last"}, "hidden states", id="last hidden state"),
        pytest.param({"return_routed_experts": True}, "routed experts", id="routed experts"),
        pytest.param({"params": {"beam_width": 2}}, "beam", id="beam search"),
        pytest.param(
            {"params": {"max_new_tokens": 0}, "return_logprob": True, "token_ids_logprob": [1]},
            "score",
            id="score",
        ),
        pytest.param({"multi_item_delimiter_indices": [3]}, "score", id="multi-item score"),
    ],
)
def test_what_runs_dense(fields: dict[str, Any], says: str) -> None:
    assert says in (reason(**fields) or "pruned")


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"return_logprob": True}, id="output logprobs, as -1"),
        pytest.param({"return_logprob": True, "logprob_start_len": 80}, id="output logprobs, as the length"),
        pytest.param({"return_logprob": True, "token_ids_logprob": [1]}, id="output token id logprobs"),
        pytest.param({"logprob_start_len": 0}, id="a start without logprobs"),
        pytest.param({"params": {"max_new_tokens": 0}}, id="prefix warm-up of n > 1"),
        pytest.param({"params": {"beam_width": 1}}, id="one beam"),
        pytest.param({"session_id": "s"}, id="a routing label"),
        pytest.param({"extra_key": "x", "cache_salt": "y"}, id="namespaces"),
    ],
)
def test_what_is_pruned_all_the_same(fields: dict[str, Any]) -> None:
    assert reason(**fields) is None


def test_a_session_request_runs_dense() -> None:
    from sglang.srt.managers.io_struct import SessionParams

    assert "sessions" in (reason(session_params=SessionParams(id="s")) or "pruned")


def test_a_prompt_of_the_window_alone_has_nothing_to_rank() -> None:
    config = msgspec.structs.replace(CONFIG, min_prompt_tokens=0)
    assert "window" in (reason(tokens=CONFIG.window, config=config) or "pruned")
    assert reason(tokens=CONFIG.window + 1, config=config) is None


def test_the_reason_names_the_server_s_values() -> None:
    assert reason(tokens=31) == "prompt shorter than 32 tokens (--claa-min-prompt-tokens)"
    config = msgspec.structs.replace(CONFIG, min_prompt_tokens=0, window=9)
    assert reason(tokens=9, config=config) == "prompt of at most 9 tokens (--claa-window)"


def test_what_the_user_chose_is_named_first() -> None:
    fields = {"return_logprob": True, "logprob_start_len": 0}
    assert reason(tokens=5, options={"enabled": False}, **fields) == "disabled by request"
    assert "input logprobs" in (reason(tokens=5, **fields) or "")


def test_a_session_label_counts_where_sessions_are_cached() -> None:
    rule = next(rule for rule in RULES if "session" in rule.asks)
    assert rule.applies(facts(session_id="s", session_cache=True))
    assert not rule.applies(facts(session_id="s"))
