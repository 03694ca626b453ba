"""Options and reports on /v1/responses, /v1/messages, and Ollama's /api/chat and /api/generate.

SGLang parses these bodies into records without a field for `custom_params`, and makes requests of its own of them. So
the body is read here, as it came, before anything of the answer is sent; what it asks reaches the tokenizer manager by
`ask.py`, and the report comes back the same way. On the other routes, options at a place where nobody reads them are
refused.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from claa_sglang import body
from claa_sglang.patches import ask
from claa_sglang.patches.hooks import Hook
from claa_sglang.requests.options import RequestError
from claa_sglang.requests.report import KEY, with_metadata

Handler = Callable[[Any, Any, Any], Awaitable[Any]]  # of a route: serving object, parsed request, raw request


async def serve_openai(original: Handler, serving: Any, request: Any, raw_request: Any) -> Any:
    """AROUND OpenAIServingBase.handle_request: SGLang reads these options itself, at one place, or not at all."""
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion

    place = body.TOP if isinstance(serving, OpenAIServingChat | OpenAIServingCompletion) else None
    try:
        body.check_body(await ask.body_of(raw_request), place)
    except RequestError as error:
        return serving.create_error_response(str(error))
    return await original(serving, request, raw_request)


async def serve_responses(original: Handler, serving: Any, request: Any, raw_request: Any = None) -> Any:
    """AROUND OpenAIServingResponses.create_responses: its options, or an HTTP 400."""
    try:
        await ask.begin(raw_request, body.TOP)
    except RequestError as error:
        return serving.create_error_response(str(error))
    return await original(serving, request, raw_request)


def report_in_response(response: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER OpenAIServingResponses._build_response, of every answer that is complete: its report, in its metadata."""
    asked = ask.current()
    if asked is not None and asked.report is not None:
        response.metadata = {**(response.metadata or {}), KEY: asked.report}
    return response


async def serve_messages(original: Handler, serving: Any, request: Any, raw_request: Any) -> Any:
    """AROUND AnthropicServing.handle_messages: its options, or an HTTP 400; and its report."""
    try:
        asked = await ask.begin(raw_request, body.TOP)
    except RequestError as error:
        return serving._error_response(400, "invalid_request_error", str(error))
    return _reported(await original(serving, request, raw_request), asked, lambda event: event.startswith(MESSAGE_END))


async def serve_ollama(original: Handler, serving: Any, request: Any, raw_request: Any) -> Any:
    """AROUND OllamaServing.handle_chat, handle_generate: its options, or an HTTP 400; and its report."""
    from fastapi.responses import JSONResponse

    try:
        asked = await ask.begin(raw_request, body.OPTIONS)
        answer = await original(serving, request, raw_request)
    except RequestError as error:
        return JSONResponse({"error": str(error)}, status_code=400)
    if hasattr(answer, "model_dump"):
        answer = JSONResponse(answer.model_dump())
    return _reported(answer, asked, lambda line: json.loads(line)["done"])


MESSAGE_END = "event: message_delta\n"


def _reported(answer: Any, asked: ask.Ask, ends: Callable[[str], bool]) -> Any:
    """The answer, a Starlette response, with the report at the end of its JSON object; of a stream, of the event that
    `ends` the answer."""
    if hasattr(answer, "body_iterator"):
        answer.body_iterator = _reported_stream(answer.body_iterator, asked, ends)
    elif asked.report is not None and answer.status_code == 200:
        answer.body = with_metadata(bytes(answer.body).decode(), asked.report).encode()
        answer.headers["content-length"] = str(len(answer.body))
    return answer


async def _reported_stream(
    events: AsyncIterator[str | bytes], asked: ask.Ask, ends: Callable[[str], bool]
) -> AsyncIterator[str | bytes]:
    try:
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                text = event.decode() if isinstance(event, bytes) else event
                report = asked.report
                yield with_metadata(text, report) if report is not None and ends(text) else event
    except RequestError as error:  # only the length of the prompt could tell, and the status is sent
        yield json.dumps({"error": str(error)}) + "\n"


_ENTRYPOINTS = "sglang.srt.entrypoints"
_RESPONSES = f"{_ENTRYPOINTS}.openai.serving_responses.OpenAIServingResponses"

HOOKS: tuple[Hook, ...] = (
    Hook(
        target=f"{_ENTRYPOINTS}.openai.serving_base.OpenAIServingBase.handle_request",
        params=("self", "request", "raw_request"),
        kind="around",
        fn=serve_openai,
        process="server",
        reason="options at a place of the body that its record drops are seen here alone, and refused",
    ),
    Hook(
        target=f"{_RESPONSES}.create_responses",
        params=("self", "request", "raw_request"),
        kind="around",
        fn=serve_responses,
        process="server",
        reason="the request record drops `custom_params`, so the body is read as it came",
    ),
    Hook(
        target=f"{_RESPONSES}._build_response",
        params=("request", "sampling_params", "output", "status", "tool_adapter", "kwargs"),
        kind="after",
        fn=report_in_response,
        process="server",
        reason="every complete response is made here: whole, streamed, stored",
    ),
    Hook(
        target=f"{_ENTRYPOINTS}.anthropic.serving.AnthropicServing.handle_messages",
        params=("self", "request", "raw_request"),
        kind="around",
        fn=serve_messages,
        process="server",
        reason="the request record drops `custom_params`, and the answer has no field for a report",
    ),
    *(
        Hook(
            target=f"{_ENTRYPOINTS}.ollama.serving.OllamaServing.{name}",
            params=("self", "request", "raw_request"),
            kind="around",
            fn=serve_ollama,
            process="server",
            reason="SGLang drops most of Ollama's options, and the answer has no field for a report",
        )
        for name in ("handle_chat", "handle_generate")
    ),
)
