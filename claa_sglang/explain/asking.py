"""Two requests: the prompt, explained; then the prompt with its answer, for what the answer looked at."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from claa_sglang.explain.error import ExplainError
from claa_sglang.explain.texts import TokenText, token_texts
from claa_sglang.tools.ask_error import one_line
from claa_sglang.tools.connection import Connection

MOST_LOOKING = 1024  # tokens of `explain_window`
# Pruned whatever the policy expects. Not finished while the server is idle: nobody will ask on.
ALWAYS: Mapping[str, Any] = {"policy": "always", "finish": False, "explain": True}


@dataclass(frozen=True)
class Explained:
    """One prompt and its answer.

    Attributes:
        info: what /server_info says.
        tokens: of the prompt.
        answer, answer_tokens: its text, and how many tokens that is.
        report: CLAA's of the first request, with `explain`.
        looking: answer tokens whose attention was looked at, the first ones; 0 where none was.
        looked_at: of each scored layer by its number as text, a share for each prompt token: the mean weight in the
            attention of the answer's tokens, over these and the heads.
    """

    info: Mapping[str, Any] = field(repr=False)
    tokens: Sequence[TokenText] = field(repr=False)
    answer: str
    answer_tokens: int
    report: Mapping[str, Any] = field(repr=False)
    looking: int
    looked_at: Mapping[str, Sequence[float | None]] = field(repr=False)


def ask(
    server: Connection, prompt: str, *, chat: bool, new: int, keep_rate: float | None, ranker: str | None
) -> Explained:
    """Ask both. server: whose errors are ExplainError. new: answer tokens at most. Raises ExplainError."""
    info = server.server_info()
    if not info["claa"]["config"].get("allow_explain"):
        raise ExplainError(
            f"{server.url} was started without --claa-allow-explain: start it with that flag to see scores of tokens"
        )
    if info.get("skip_tokenizer_init"):
        raise ExplainError(f"{server.url} has no tokenizer: start it without --skip-tokenizer-init")
    ids = _encode(server, prompt, chat)
    given = {"keep_rate": keep_rate, "ranker": ranker}
    claa = {**ALWAYS, **{name: value for name, value in given.items() if value is not None}}
    key = f"claa-explain-{secrets.token_hex(8)}"  # of the prefix cache: what others cached is not found
    answer = _generate(server, ids, claa, new, key)
    report = _explained(answer, len(ids))
    whole = _without_end(answer)
    answer_ids = whole[: _most_looking(info)]
    looked_at: Mapping[str, Sequence[float | None]] = {}
    if answer_ids and report["explain"]["steps"][0]["layers"]:
        claa = {**claa, "explain_window": len(answer_ids)}
        again = _explained(_generate(server, ids + answer_ids, claa, 1, key), len(ids) + len(answer_ids))
        looked_at = again["explain"]["looked_at"]["layers"]
    return Explained(
        info=info,
        tokens=token_texts(server, ids),
        answer=answer.get("text") or "",
        answer_tokens=len(whole),
        report=report,
        looking=len(answer_ids) if looked_at else 0,
        looked_at=looked_at,
    )


def _encode(server: Connection, prompt: str, chat: bool) -> list[int]:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    ids = server.post("/tokenize", body).get("tokens")
    if not isinstance(ids, list) or not ids:
        raise ExplainError(f"{server.url}/tokenize gives no tokens for the prompt: give another --prompt-file")
    return ids


def _generate(server: Connection, ids: Sequence[int], claa: Mapping[str, Any], new: int, key: str) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": new, "custom_params": {"claa": claa}}
    return server.post("/generate", {"input_ids": ids, "sampling_params": sampling, "extra_key": key})


def _explained(answer: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The report of a pruned answer, with its scores. Raises ExplainError where there are none."""
    report = (answer.get("meta_info") or {}).get("claa")
    if report is None:
        raise ExplainError("an answer has no report of CLAA: start every server behind this URL alike")
    if "error" in report:
        raise ExplainError(f"the report of an answer failed on the server: {one_line(str(report['error']))}")
    if not report["pruned"]:
        raise ExplainError(
            f"a prompt of {tokens} tokens is not pruned ({report.get('reason', 'no reason given')}): nothing was "
            "scored; see docs/faq.md for the reason"
        )
    if "steps" not in report.get("explain", {}):
        raise ExplainError(f"nothing was scored: {report.get('explain', {}).get('none', 'no reason given')}")
    return report


def _without_end(answer: Mapping[str, Any]) -> list[int]:
    """Ids of the answer, without the token that ended it, which is no part of the text."""
    ids = list(answer.get("output_ids") or ())
    reason = answer["meta_info"].get("finish_reason") or {}
    return ids[:-1] if ids and reason.get("type") == "stop" and reason.get("matched") == ids[-1] else ids


def _most_looking(info: Mapping[str, Any]) -> int:
    """Tokens that `explain_window` can have on this server, as its last chunk must hold them."""
    chunk = info.get("chunked_prefill_size") or 0
    return MOST_LOOKING if chunk <= 0 else min(MOST_LOOKING, chunk - (info.get("page_size") or 1) + 1)
