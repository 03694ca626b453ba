"""Reports in the `metadata` of chat and completion responses, and of the chunk that ends a streamed choice.

`metadata["claa"]` of a whole response is the report where there is one choice, and a list in the order of the
choices where there are several (n above 1, several prompts). A streamed choice has its own, in the chunk with
its `finish_reason`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from claa_sglang.patches import attached
from claa_sglang.patches.ask import as_shown, current
from claa_sglang.patches.hooks import Hook
from claa_sglang.requests.report import KEY, Report, with_metadata

Events = AsyncGenerator[str, None]  # server-sent events, as text
Outputs = AsyncGenerator[dict, None]  # of the tokenizer manager, one per update of a choice

SSE = "data: "


def add_metadata(response: Any, _serving: Any, _request: Any, ret: list[dict], _created: int) -> Any:
    """AFTER _build_chat_response, _build_completion_response: the reports of `ret`, one item per choice."""
    reports = [item["meta_info"].get(KEY) for item in ret]
    # An error response, which has no metadata, stays as it is.
    if hasattr(response, "metadata") and any(report is not None for report in reports):
        reports = [None if report is None else as_shown(report) for report in reports]
        value = reports[0] if len(reports) == 1 else reports
        response.metadata = {**(response.metadata or {}), KEY: value}
    return response


def stream_with_metadata(
    original: Callable[..., Events], serving: Any, adapted_request: Any, request: Any, raw_request: Any
) -> Events:
    """AROUND _generate_chat_stream and _generate_completion_stream: the server-sent events, with metadata."""
    reports = attached.reports.hang(adapted_request, {})  # filled as choices finish
    return _annotated(original(serving, adapted_request, request, raw_request), reports)


def watch(original: Callable[..., Outputs], manager: Any, obj: Any, request: Any = None) -> Outputs:
    """AROUND TokenizerManager.generate_request: options that a route has no field for, and reports it has none for.

    SGLang's OpenAI streams read what they need from these outputs and drop the rest, and so do its routes for other
    clients' formats. Others pass at no cost.
    """
    streamed = attached.reports.find(obj)
    wanted = [] if streamed is None else [streamed]
    if (ask := current()) is not None:
        ask.put_into(obj)
        wanted.append(ask.reports)
    outputs = original(manager, obj, request)
    return _watched(outputs, wanted) if wanted else outputs


async def _watched(outputs: Outputs, wanted: list[dict[int, Report]]) -> Outputs:
    async with aclosing(outputs):
        async for output in outputs:
            if (report := output["meta_info"].get(KEY)) is not None:
                for reports in wanted:
                    reports[output.get("index", 0)] = as_shown(report)
            yield output


async def _annotated(events: Events, reports: dict[int, Report]) -> Events:
    async with aclosing(events):
        async for event in events:
            yield with_report(event, reports) if reports else event


def with_report(event: str, reports: dict[int, Report]) -> str:
    """`event` with the report of the choice it finishes, if it finishes one; otherwise unchanged."""
    text = event.strip()
    if not (text.startswith(SSE + "{") and text.endswith("}")):
        return event
    try:
        choices = json.loads(text[len(SSE) :]).get("choices", ())
        ended = [choice["index"] for choice in choices if choice.get("finish_reason")]
    except (ValueError, TypeError, AttributeError, KeyError):
        return event  # not a chunk
    report = next((reports[index] for index in ended if index in reports), None)
    return event if report is None else with_metadata(event, report)


_OPENAI = "sglang.srt.entrypoints.openai"
_CHAT = f"{_OPENAI}.serving_chat.OpenAIServingChat"
_COMPLETION = f"{_OPENAI}.serving_completions.OpenAIServingCompletion"

HOOKS: tuple[Hook, ...] = (
    *(
        Hook(
            target=target,
            params=("self", "request", "ret", "created"),
            kind="after",
            fn=add_metadata,
            process="server",
            reason="the response model has a metadata field, and SGLang fills it here",
        )
        for target in (f"{_CHAT}._build_chat_response", f"{_COMPLETION}._build_completion_response")
    ),
    *(
        Hook(
            target=target,
            params=("self", "adapted_request", "request", "raw_request"),
            kind="around",
            fn=stream_with_metadata,
            process="server",
            reason="streamed chunks have no metadata field; this is where their text passes",
        )
        for target in (f"{_CHAT}._generate_chat_stream", f"{_COMPLETION}._generate_completion_stream")
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        params=("self", "obj", "request"),
        kind="around",
        fn=watch,
        process="server",
        reason="the outputs that streams and other clients' formats are made of pass here, and only here",
    ),
)
