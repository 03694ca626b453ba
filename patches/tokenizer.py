"""Requests are refused before they leave the tokenizer process, and reports arrive in `meta_info["claa"]`.

A streaming `/generate` answers 200 before SGLang validates it, so that route is checked at its JSON contract
too. Every route, and `sgl.Engine`, passes the tokenizer manager's own check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from claa_sglang.patches.hooks import Hook
from claa_sglang.requests.body import PARAMETERS, SAMPLING, check_body, with_defaults
from claa_sglang.requests.options import (
    RequestError,
    RequestOptions,
    check_decoding,
    check_explain,
    check_keep,
    parse_options,
)
from claa_sglang.requests.report import KEY
from claa_sglang.start.server_config import config_of, largest_window


def check_request(manager: Any, obj: Any, input_ids: Any) -> None:
    """BEFORE TokenizerManager._validate_one_request: raises a ValueError, such as RequestError, which becomes a 400.

    obj: one request (SGLang splits batches first). It gets the server's default options where it has no own: SGLang
    takes its preferred parameters for those that a request leaves out, and some routes always send `custom_params`.
    """
    params, options = obj.sampling_params, RequestOptions()
    if isinstance(params, Mapping):
        preferred = manager.preferred_sampling_params or {}
        given = params.get("custom_params", preferred.get("custom_params"))
        custom_params = with_defaults(given, preferred)
        if custom_params is not given:
            obj.sampling_params = {**params, "custom_params": custom_params}
        options = parse_options(custom_params)
    if options.decode_dense_layers is not None:
        check_decoding(options, config_of(manager.server_args))
    check_prompt(manager, obj, input_ids)
    tokens = None if input_ids is None else len(input_ids)
    if tokens is not None:
        check_keep(options, tokens)
    if options.explain:
        check_explain(options, config_of(manager.server_args), tokens, largest_window(manager.server_args))


def check_prompt(manager: Any, obj: Any, input_ids: Any) -> None:
    """Raises ValueError for a prompt that would stop the scheduler, and with it everybody's requests.

    SGLang 0.5.23 lets two kinds through that its models cannot embed: no token at all, unless it is the only
    prompt of its body, and ids outside the vocabulary.
    """
    if input_ids is None or obj.input_embeds is not None:
        return
    vocab_size = manager.model_config.vocab_size
    try:
        size = len(input_ids)
        # A tokenizer's ids need no check.
        ends = (min(input_ids), max(input_ids)) if size and obj.input_ids is not None else ()
        wrong = [token_id for token_id in ends if not 0 <= token_id < vocab_size]
    except TypeError as error:  # ids in place of prompts, or prompts in place of ids
        raise ValueError("input_ids: give one list of token ids for each prompt") from error
    if not size and not getattr(obj, "session_params", None):  # a session's history may be the prompt
        raise ValueError("the prompt is empty: give at least one token")
    if wrong:
        raise ValueError(f"input_ids: {wrong[0]} is no token of this model: its ids are 0 to {vocab_size - 1}")


def check_generate_body(error: str | None, body: Any) -> str | None:
    """AFTER api_contract.generate_contract_error: what is wrong with a `/generate` body, None if nothing is.

    body: parsed JSON of any shape, also of the Vertex route, which has a list of `instances`. A batch has one object of
    sampling parameters, or a list of one per item.
    """
    if error is None and isinstance(body, Mapping):
        try:
            check_body(body, PARAMETERS if "instances" in body else SAMPLING)
        except RequestError as refusal:
            return str(refusal)
    return error


def take_report(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict,
    state: Any,
    customized_info: dict,
    index: int,
    finish_reason: dict | None,
) -> None:
    """AROUND TokenizerManager.update_request_meta_info: one dict in the final chunk.

    SGLang accumulates such values in lists, one entry per output token, and slices them when it streams.
    A report is one per request, so it bypasses that.
    """
    others = {key: values for key, values in customized_info.items() if key != KEY}
    original(manager, meta_info, state, others, index, finish_reason)
    reports = customized_info.get(KEY)
    if reports and reports[index]:
        meta_info[KEY] = reports[index][0]


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        params=("self", "obj", "input_ids"),
        kind="before",
        fn=check_request,
        process="server",
        reason='custom_params["claa"] and the prompt are checked where SGLang checks a request, for an HTTP 400',
    ),
    Hook(
        target="sglang.srt.entrypoints.api_contract.generate_contract_error",
        params=("body",),
        kind="after",
        fn=check_generate_body,
        process="server",
        reason="streams of /generate and of the Vertex route send their status before any other check",
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        params=("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
        kind="around",
        fn=take_report,
        process="server",
        reason="a report is one value per request, and SGLang would list and slice it per token",
    ),
)
