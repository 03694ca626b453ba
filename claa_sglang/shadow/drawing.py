"""Which requests are drawn: a share of those whose tokens are chosen by the model's own probabilities alone.

Rules read SGLang's request record by attribute, so that this module imports nothing of SGLang; an attribute that does
not exist is an error, never a rule that silently does not apply.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple


class Facts(NamedTuple):
    """What rules read.

    request: SGLang's TokenizedGenerateReqInput, its sampling parameters normalized. no_logs: whether the client asked
    that nothing of it is logged. server_steers: whether the server itself changes what is likely, for any request.
    """

    request: Any
    no_logs: bool
    server_steers: bool


class Rule(NamedTuple):
    """One kind of request that is never drawn. asks: what it asks for, as a user would name it."""

    asks: str
    applies: Callable[[Facts], Any]


def _penalized(f: Facts) -> bool:
    params = f.request.sampling_params
    return bool(params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1)


def _constrained(f: Facts) -> bool:
    params = f.request.sampling_params
    return any(value is not None for value in (params.json_schema, params.regex, params.ebnf, params.structural_tag))


def _not_of_tokens(f: Facts) -> bool:
    request = f.request
    return any(value is not None for value in (request.input_embeds, request.positional_embed_overrides))


RULES: tuple[Rule, ...] = (
    Rule("penalties", _penalized),
    Rule("`logit_bias`", lambda f: f.request.sampling_params.logit_bias),
    Rule("a schema, expression or grammar", _constrained),
    Rule("`min_new_tokens`", lambda f: f.request.sampling_params.min_new_tokens > 0),
    Rule("a custom logit processor", lambda f: f.request.custom_logit_processor),
    Rule("a thinking budget", lambda f: "thinking_budget" in (f.request.sampling_params.custom_params or {})),
    Rule("a watermark", lambda f: f.request.sampling_params.watermark is not None),
    Rule("`--enable-watermark`, `--enable-strict-thinking`", lambda f: f.server_steers),
    Rule("several samples", lambda f: f.request.sampling_params.n > 1),
    Rule("beam search", lambda f: (f.request.sampling_params.beam_width or 1) > 1),
    Rule("input embeddings", _not_of_tokens),
    Rule("images, audio, video", lambda f: f.request.mm_inputs is not None),
    Rule("a session", lambda f: f.request.session_params is not None),
    Rule("LoRA", lambda f: f.request.lora_id is not None),
    Rule("`no_logs`", lambda f: f.no_logs),
)


def can_be_drawn(facts: Facts) -> bool:
    """Whether no rule speaks against it."""
    return not any(rule.applies(facts) for rule in RULES)


class Draws:
    """Independent draws, the same for the same seed.

    Args:
        rate: the probability of each, 0 to 1.
        seed: any integer.
    """

    def __init__(self, rate: float, seed: int) -> None:
        self._rate, self._random = rate, random.Random(seed)

    def draw(self) -> bool:
        """The next one: always false at rate 0, always true at 1."""
        return self._random.random() < self._rate
