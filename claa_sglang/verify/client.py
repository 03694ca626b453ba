"""A live server, over HTTP: what it says of itself, and its answers with everything that can be compared."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests

from claa_sglang.tools.ask_error import one_line
from claa_sglang.tools.connection import Connection
from claa_sglang.tools.streaming import StreamFailed, timed
from claa_sglang.verify.cost import Cost
from claa_sglang.verify.error import VerifyError

TOPS = 5  # log probabilities of each generated token
LEAST_VOCABULARY = 256  # of any model: a token for each byte
DENSE: Mapping[str, Any] = {"enabled": False}
# Always: the policy would leave dense what it expects no gain from. Not finished: nobody will ask on, so that idle
# steps of the server are not spent on it, and a hit finds what was pruned.
PRUNED: Mapping[str, Any] = {"policy": "always", "finish": False}
WHOLE: Mapping[str, Any] = {**PRUNED, "keep_rate": 1}

Prompt = Mapping[str, Any]  # {"text": …} or {"input_ids": […]}


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    tokens: ids. chosen: log probability of each, in nats. tops: of each, those of the likeliest tokens by id; both are
    empty where they were not asked for. report: CLAA's. cached: prompt tokens from the prefix cache.
    began, ended: of time.perf_counter, around the request. ttft: seconds to the first token; None unless streamed.
    """

    text: str | None
    tokens: list[int]
    chosen: list[float] = field(repr=False)
    tops: list[dict[int, float]] = field(repr=False)
    report: Mapping[str, Any] = field(repr=False)
    prompt_tokens: int
    cached: int
    began: float
    ended: float
    ttft: float | None = None

    @property
    def pruned(self) -> bool:
        return bool(self.report.get("pruned"))

    @property
    def kept(self) -> list[int] | None:
        """Prompt positions that the first prune kept, where they were asked for; None of a dense request."""
        return self.report.get("kept")


class Client:
    """Asks one server. Every answer is counted in `cost`; `asked` is called after each.

    url: with its scheme. api_key: None for a server without one. timeout: seconds for one answer.
    Methods raise VerifyError.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = 600.0,
        asked: Callable[[], object] = lambda: None,
    ):
        self._connection = Connection(url, api_key, timeout, error=VerifyError)
        self.url = self._connection.url
        self.cost = Cost()
        self.asked = asked

    def server_info(self) -> dict[str, Any]:
        """What /server_info says, of a server with CLAA."""
        return self._connection.server_info()

    def model_info(self) -> dict[str, Any]:
        """What /model_info says."""
        return self._connection.get("/model_info")

    def vocabulary(self) -> int:
        """Token ids of the model. Computes nothing: the server says it as it refuses to report a token there is not."""
        body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
        answer = self._connection.send("POST", "/generate", {**body, "return_logprob": True, "token_ids_logprob": [-1]})
        found = re.search(r"valid range is \[0, (\d+)\)", answer.text)
        return int(found[1]) if found else LEAST_VOCABULARY

    def ask(
        self,
        prompt: Prompt,
        claa: Mapping[str, Any],
        new: int,
        key: str,
        *,
        compared: bool = True,
        stream: bool = False,
    ) -> Answer:
        """The greedy answer to `prompt`.

        claa: the request's options. new: generated tokens; exactly so many where the answer is `compared`, and then
        with log probabilities and kept positions. key: of the prefix cache; a prompt under a new one is cold.
        """
        options = {**claa, **({"return_kept": True} if compared and claa is not DENSE else {})}
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": compared, "custom_params": {"claa": options}}
        body: dict[str, Any] = {**prompt, "sampling_params": sampling, "extra_key": key}
        if compared:
            body |= {"return_logprob": True, "top_logprobs_num": TOPS}
        began, ttft = time.perf_counter(), None
        if stream:
            ttft, found = self._streamed(body)
        else:
            found = self._connection.post("/generate", body)
        return self._answer(found, began, ttft)

    def _answer(self, found: dict[str, Any], began: float, ttft: float | None) -> Answer:
        meta = found.get("meta_info") or {}
        report = meta.get("claa")
        if report is None:
            raise VerifyError(f"an answer of {self.url} has no report of CLAA: start every server behind it alike")
        if "error" in report:
            raise VerifyError(f"the report of an answer failed on the server: {one_line(str(report['error']))}")
        answer = Answer(
            text=found.get("text"),
            tokens=list(found.get("output_ids") or ()),
            chosen=[value for value, *_ in meta.get("output_token_logprobs") or ()],
            tops=[{token: value for value, token, *_ in top} for top in meta.get("output_top_logprobs") or ()],
            report=report,
            prompt_tokens=meta["prompt_tokens"],
            cached=meta["cached_tokens"],
            began=began,
            ended=time.perf_counter(),
            ttft=ttft,
        )
        self.cost.add(answer.prompt_tokens, answer.cached, meta["completion_tokens"])
        self.asked()
        return answer

    def _streamed(self, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        try:
            return timed(self.url, body, self._connection.timeout, self._connection.headers)
        except StreamFailed as error:
            raise VerifyError(one_line(str(error))) from error
        except (requests.RequestException, ValueError) as error:
            raise self._connection.unreachable("/generate", error) from error
