"""Why a request runs dense, as a table: name, what it asks for, condition, reason. The first row that applies decides.

Conditions read SGLang's request record by attribute, so that this module imports nothing of SGLang; an attribute that
does not exist is an error, never a rule that silently does not apply. What a whole server refuses is in `refusals.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from claa_sglang.config.config import ClaaConfig
from claa_sglang.requests.options import RequestOptions


class Facts(NamedTuple):
    """What conditions read.

    request: SGLang's TokenizedGenerateReqInput. prompt_tokens: length of the prompt as it will run.
    session_cache: whether the server keeps sessions in the radix cache.
    """

    options: RequestOptions
    config: ClaaConfig
    request: Any
    prompt_tokens: int
    session_cache: bool


class DenseRule(NamedTuple):
    """One thing that runs dense.

    name: in metrics, where a reason is a label. asks: what the request asks for, as a user would name it.
    reason: for the report; `{name}` stands for a value of the configuration.
    """

    name: str
    asks: str
    applies: Callable[[Facts], Any]
    reason: str


def dense_reason(facts: Facts) -> str | None:
    """Why this request runs dense, for `meta_info["claa"]["reason"]`; None when it is to be pruned."""
    rule = next((rule for rule in RULES if rule.applies(facts)), None)
    if rule is None:
        return None
    values = {"min_prompt_tokens": facts.config.min_prompt_tokens, "window": facts.config.window}
    return rule.reason.format_map(values)


def _input_logprobs(f: Facts) -> bool:
    """SGLang writes "none" as logprob_start_len -1, or the prompt's length; any other negative number means all."""
    start = f.request.logprob_start_len
    return bool(f.request.return_logprob) and start != -1 and start < f.prompt_tokens


def _score(f: Facts) -> bool:
    labels = f.request.token_ids_logprob is not None and f.request.sampling_params.max_new_tokens == 0
    return labels or f.request.multi_item_delimiter_indices is not None or f.request.token_indices_to_pool is not None


RULES: tuple[DenseRule, ...] = (
    DenseRule(
        "opted_out",
        '`custom_params` `{"claa": {"enabled": false}}`',
        lambda f: not f.options.enabled,
        "disabled by request",
    ),
    DenseRule(
        "input_logprobs",
        "input logprobs (`logprob_start_len` within the prompt), and so `sgl.select`",
        _input_logprobs,
        "input logprobs need every row of the prompt in the late layers",
    ),
    DenseRule(
        "short_prompt",
        "a prompt below `--claa-min-prompt-tokens`",
        lambda f: f.prompt_tokens < f.config.min_prompt_tokens,
        "prompt shorter than {min_prompt_tokens} tokens (--claa-min-prompt-tokens)",
    ),
    DenseRule(
        "input_embeds",
        "`input_embeds`, positional embedding overrides",
        lambda f: f.request.input_embeds is not None or f.request.positional_embed_overrides is not None,
        "input embeddings do not have token ids to share a prefix by",
    ),
    DenseRule("multimodal", "images, audio, video", lambda f: f.request.mm_inputs is not None, "multimodal input"),
    DenseRule(
        "hidden_states",
        "`return_hidden_states`",
        lambda f: f.request.return_hidden_states,
        "hidden states are returned for every prompt token",
    ),
    DenseRule(
        "routed_experts",
        "`return_routed_experts`, `return_indexer_topk`",
        lambda f: f.request.return_routed_experts or f.request.return_indexer_topk,
        "routed experts or indexer choices are returned for every prompt token",
    ),
    DenseRule(
        "session",
        "`session_params`, and `session_id` with a session cache",
        lambda f: f.request.session_params is not None or (f.request.session_id is not None and f.session_cache),
        "sessions keep their KV beyond the request",
    ),
    DenseRule(
        "beam_search",
        "`beam_width` above 1",
        lambda f: (f.request.sampling_params.beam_width or 1) > 1,
        "beam search copies KV between requests",
    ),
    DenseRule("score", "`/v1/score`", _score, "score requests compare logprobs, and have no way to opt out"),
    DenseRule(
        "within_window",
        "a prompt of no more than `--claa-window` tokens",
        lambda f: f.prompt_tokens <= f.config.window,
        "prompt of at most {window} tokens (--claa-window)",
    ),
)


# What turns a request dense later, in the same words: name, reason.
CAPACITY = "needs {need} early and late KV slots of a pool of {capacity}"
ABORTED = "aborted before it ran"
OBSERVED = "observed: nothing was dropped (--claa-mode observe)"
INVALID = "the request's custom_params are invalid"
LATER = (("capacity", CAPACITY), ("aborted", ABORTED), ("observed", OBSERVED), ("invalid", INVALID))

_NAMED = tuple(
    (name, re.compile("[^ ]+".join(map(re.escape, re.split(r"\{\w+\}", reason)))))
    for name, reason in (*((rule.name, rule.reason) for rule in RULES), *LATER)
)
OTHER = "other"


def name_of(reason: str) -> str:
    """Which rule a report's `reason` is of; OTHER if none."""
    return next((name for name, pattern in _NAMED if pattern.fullmatch(reason)), OTHER)
