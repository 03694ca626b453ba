"""One request for each HTTP route whose prompts may be pruned, and where its answer has the report."""

from __future__ import annotations

import json
from typing import Any

import requests

from claa_sglang.requests import routes
from tests.engine_server import Server

MODEL = "default"  # what a server is to be called
TEXT = "TEXT"  # to be filled in
_MESSAGES = {"model": MODEL, "messages": [{"role": "user", "content": TEXT}]}
_SHORT = {"temperature": 0, "max_tokens": 4}
_OLLAMA = {"temperature": 0, "num_predict": 4}
_BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"text": TEXT, "sampling_params": {"temperature": 0, "max_new_tokens": 4}},
    "/vertex_generate": {
        "instances": [{"text": TEXT}],
        "parameters": {"sampling_params": {"temperature": 0, "max_new_tokens": 4}},
    },
    "/v1/completions": {"model": MODEL, "prompt": TEXT, **_SHORT},
    "/v1/chat/completions": {**_MESSAGES, **_SHORT},
    "/invocations": {**_MESSAGES, **_SHORT},
    "/v1/responses": {"model": MODEL, "input": TEXT, "temperature": 0, "max_output_tokens": 16},
    "/v1/messages": {**_MESSAGES, **_SHORT},
    "/api/chat": {**_MESSAGES, "options": _OLLAMA},
    "/api/generate": {"model": MODEL, "prompt": TEXT, "options": _OLLAMA},
}
SHOWS_CACHED = ("/generate", "/vertex_generate")  # whatever the server's switch


def post(
    running: Server, route: routes.Route, text: str, claa: Any = None, *, stream: bool = False, place: str | None = None
) -> requests.Response:
    """Send `text` on a route, with these options at the place of the route or at another."""
    body = json.loads(json.dumps(_BODIES[route.path]).replace(TEXT, text))
    if claa is not None:
        *steps, last = (place or route.place).split(".")
        inner = body
        for step in steps:
            inner = inner.setdefault(step, {})
        inner[last] = {"claa": claa}
    (body["parameters"] if "instances" in body else body)["stream"] = stream
    return running.post(route.path, body)


def report_of(route: routes.Route, answer: requests.Response, stream: bool) -> dict[str, Any]:
    """The one report of an answer. Raises AssertionError where there is none, or at another place than it says."""
    assert answer.status_code == 200, f"{route.path}: {answer.status_code}: {answer.text[:500]}"
    if not stream:
        whole = answer.json()
        whole = whole["predictions"][0] if "predictions" in whole else whole
        return (whole["meta_info"] if route.path in SHOWS_CACHED else whole["metadata"])["claa"]
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines()]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    found = [(event, report) for event in events if (report := _report(event))]
    assert len(found) == 1, f"{route.path}: {len(found)} reports in {answer.text[:2000]}"
    event, report = found[0]
    assert _ends(event), f"{route.path}: {event}"
    return report


def _report(event: dict[str, Any]) -> dict[str, Any] | None:
    response = event.get("response")  # Ollama has a text there
    inner = response.get("metadata") if isinstance(response, dict) else None
    holders = (event.get("meta_info"), event.get("metadata"), inner)
    return next((holder["claa"] for holder in holders if isinstance(holder, dict) and "claa" in holder), None)


def _ends(event: dict[str, Any]) -> bool:
    """Whether the event is the one that ends an answer, in the format of its route."""
    if "type" in event:
        return event["type"] in ("message_delta", "response.completed", "response.incomplete")
    ended = event.get("done") or event.get("meta_info", {}).get("finish_reason")
    return bool(ended or any(choice["finish_reason"] for choice in event.get("choices", ())))


def paths() -> set[str]:
    """The routes that have a request here."""
    return set(_BODIES)
