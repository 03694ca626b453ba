"""The server of the tests of routes: SmolLM2, pruned from 64 tokens on, with a tokenizer; and what they ask it."""

from __future__ import annotations

import json
from typing import Any

import requests

from tests.route_bodies import MODEL

MIN_PROMPT = 64
KEEP_RATE = 0.3
PRUNE_LAYER, SCORE_LAYERS = 19, [17, 18]
FLAGS = (
    "--enable-claa",
    *("--claa-profile", "none"),
    *("--claa-policy", "always"),
    *("--claa-finish", "off"),
    *("--claa-keep-rate", str(KEEP_RATE)),
    *("--claa-prune-layer", str(PRUNE_LAYER)),
    *("--claa-score-layers", ",".join(map(str, SCORE_LAYERS))),
    *("--claa-min-prompt-tokens", str(MIN_PROMPT)),
    *("--served-model-name", MODEL),
    *("--preferred-sampling-params", json.dumps({"custom_params": {"claa": {"return_kept": True}}})),
    "--enable-custom-logit-processor",
    *("--tool-call-parser", "pythonic", "--reasoning-parser", "deepseek-v3"),
    "--enable-metrics",
    "--claa-allow-explain",
)
SENTENCE = "The ferry crosses the bay four times a day, and the harbour master writes every crossing down. "
GREEDY = {"temperature": 0, "max_new_tokens": 4}


def text(name: str, sentences: int = 5) -> str:
    """A prompt of about 20 tokens a sentence that shares no prefix with one of another name."""
    return f"{name}: " + SENTENCE * sentences


def options(**claa: Any) -> dict[str, Any]:
    return {**GREEDY, "custom_params": {"claa": claa}}


def claa_of(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["meta_info"]["claa"]


def events(response: requests.Response) -> list[dict[str, Any]]:
    """Server-sent events of a whole stream, without its end mark."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
