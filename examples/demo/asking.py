"""Ask an SGLang server with a clock running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from claa_sglang.tools.streaming import timed

REQUEST_TIMEOUT = 600.0  # seconds


@dataclass(frozen=True)
class Answer:
    """One answer: its text, the seconds to the first token, and SGLang's `meta_info`."""

    text: str
    ttft: float
    meta: Mapping[str, Any]

    @property
    def claa(self) -> Mapping[str, Any]:
        """The plugin's report; empty from a stock server."""
        return self.meta.get("claa") or {}


def ask(url: str, text: str, max_new_tokens: int, options: Mapping[str, Any] | None) -> Answer:
    """Greedy answer to `text`, a prompt with its chat template applied. `options` go to the plugin, per request.

    The clock runs from before the request is sent to the first token that arrives.
    """
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_new_tokens}
    if options is not None:
        params["custom_params"] = {"claa": dict(options)}
    ttft, last = timed(url, {"text": text, "sampling_params": params}, REQUEST_TIMEOUT)
    return Answer(text=last["text"].strip(), ttft=ttft, meta=last["meta_info"])
