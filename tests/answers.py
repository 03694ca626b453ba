"""Asking a test server for answers with everything that can be compared: tokens, logprobs, kept positions, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from claa_sglang.tools.servers import ONE_THREAD as ONE_THREAD
from claa_sglang.tools.servers import STRICT as STRICT
from claa_sglang.tools.servers import Server
from tests.reference_model import Expected

# Without a tokenizer, and without using the processor while nothing is asked.
TINY_FLAGS = ("--skip-tokenizer-init", "--sleep-on-idle")
# Largest difference of a log probability between SGLang and transformers in float32, on tiny models.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Ask:
    """One request. `keep` None: opted out (dense)."""

    prompt: list[int] = field(repr=False)
    keep: float | None = None
    new: int = 8
    extra: dict[str, Any] = field(default_factory=dict)  # more of the request body
    options: dict[str, Any] = field(default_factory=dict)  # more options of CLAA

    def params(self) -> dict[str, Any]:
        claa = {"enabled": False} if self.keep is None else {"keep_rate": self.keep, "return_kept": True}
        params = {"temperature": 0, "max_new_tokens": self.new, "ignore_eos": True}
        return {**params, "custom_params": {"claa": {**claa, **self.options}}}


@dataclass(frozen=True)
class Answer:
    """What came back. `logprobs` is `[tokens, vocabulary]`, when it was asked for."""

    tokens: list[int]
    cached: int
    report: dict[str, Any] = field(repr=False)
    logprobs: Tensor | None = field(default=None, repr=False)
    replica: int | None = None  # which one answered; None of a server without replicas

    @property
    def kept(self) -> list[int] | None:
        """Prompt positions that the first prune kept; None of a dense request."""
        return self.report.get("kept")

    @property
    def kept_by_step(self) -> list[list[int]]:
        """Prompt positions that each prune kept; none of a dense request."""
        steps = self.report.get("steps", [self.report])
        return [step["kept"] for step in steps if "kept" in step]


def ask(server: Server, asked: Ask, vocabulary: int = 0) -> Answer:
    """Answer of one request; with all log probabilities of its tokens if `vocabulary` is given."""
    more = {"return_logprob": True, "top_logprobs_num": vocabulary} if vocabulary else {}
    body = server.generate(input_ids=asked.prompt, sampling_params=asked.params(), **more, **asked.extra)
    return _answer(body, vocabulary)


def ask_together(server: Server, asked: Sequence[Ask]) -> list[Answer]:
    """Answers of requests that arrive at once."""
    params = [one.params() for one in asked]
    bodies = server.generate(input_ids=[one.prompt for one in asked], sampling_params=params)
    return [_answer(body, 0) for body in bodies]


def check(answer: Answer, expected: Expected, tolerance: float = TOLERANCE) -> None:
    """The answer is the reference's: kept positions, tokens and, if there, log probabilities."""
    if answer.kept is not None:
        differ = [sorted(set(a) ^ set(e)) for a, e in zip(answer.kept_by_step, expected.kept, strict=True)]
        assert answer.kept_by_step == expected.kept, f"kept sets differ at {differ}, margin {expected.margin:.1e}"
    assert answer.tokens == expected.tokens
    if answer.logprobs is not None:
        difference = (answer.logprobs - expected.logprobs).abs().max().item()
        assert difference < tolerance, f"log probabilities differ by {difference:.1e}"


def check_idle(server: Server) -> None:
    """Nothing is held: every late slot is back, and the cache can be emptied completely."""
    assert not (left := server.left_behind()), left


def _answer(body: dict[str, Any], vocabulary: int) -> Answer:
    meta = body["meta_info"]
    logprobs = None
    if vocabulary:
        logprobs = torch.full((len(body["output_ids"]), vocabulary), torch.nan)
        for row, choices in enumerate(meta["output_top_logprobs"]):
            for value, token, _ in choices:
                logprobs[row, token] = value
        assert not logprobs.isnan().any()
    return Answer(body["output_ids"], meta["cached_tokens"], meta.get("claa", {}), logprobs, meta.get("dp_rank"))
