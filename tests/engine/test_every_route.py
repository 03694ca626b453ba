"""What a client of any route sees: options, 400s and reports; `/server_info` and `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from claa_sglang.requests import routes
from tests import route_bodies
from tests.engine_server import Server
from tests.route_bodies import MODEL
from tests.routes_server import GREEDY, KEEP_RATE, MIN_PROMPT, PRUNE_LAYER, SCORE_LAYERS, claa_of, options, text
from tests.scrape import counting, scrape

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def served(routes_server: Server) -> Server:
    return routes_server


# --- OpenAI routes ---


@pytest.fixture(scope="module")
def client(served: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as made:
        yield made


EXTRA = {"custom_params": {"claa": {"keep_rate": 0.5, "return_kept": True}}}


def has_own_rate(report: dict[str, Any]) -> bool:
    return report["pruned"] and report["keep_rate"] == 0.5 and len(report["kept"]) == report["kept_tokens"]


def test_chat_metadata(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": text("chat")}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, extra_body=EXTRA)
    metadata: Any = answer.model_dump()["metadata"]
    assert has_own_rate(metadata["claa"]) and answer.usage
    assert metadata["claa"]["prompt_tokens"] == answer.usage.prompt_tokens


def test_metadata_of_several_choices_is_a_list(client: openai.OpenAI) -> None:
    prompts = [text("several"), text("choices", 2)]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, n=2, extra_body=EXTRA)
    reports = answer.model_dump()["metadata"]["claa"]
    assert [report["pruned"] for report in reports] == [True, True, False, False] and len(answer.choices) == 4


def test_a_streamed_chat_ends_with_its_report(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": text("chat stream")}]
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=4, n=2, stream=True, extra_body=EXTRA
    )
    check_stream([chunk.model_dump() for chunk in stream], choices=2)


def test_a_streamed_completion_ends_with_its_report(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=text("completion stream"), max_tokens=4, stream=True, extra_body=EXTRA
    )
    check_stream([chunk.model_dump() for chunk in stream], choices=1)


def check_stream(chunks: list[dict[str, Any]], choices: int) -> None:
    ends = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
    assert len(ends) == choices and all(has_own_rate(chunk["metadata"]["claa"]) for chunk in ends)
    assert all("metadata" not in chunk for chunk in chunks if chunk not in ends)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_reasoning_is_where_its_parser_puts_it_and_the_report_is_there(client: openai.OpenAI, stream: bool) -> None:
    """The server has a reasoning parser. To a small model that never ends its thoughts, all of its answer is one."""
    messages: Any = [{"role": "user", "content": text(f"think {stream}")}]
    asked = {**EXTRA, "chat_template_kwargs": {"thinking": True}}
    answer: Any = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0, stream=stream, extra_body=asked
    )
    chunks = [chunk.model_dump() for chunk in answer] if stream else [answer.model_dump()]
    parts = [choice["delta" if stream else "message"] for chunk in chunks for choice in chunk["choices"]]
    reasoning, content = ("".join(part.get(name) or "" for part in parts) for name in ("reasoning_content", "content"))
    assert reasoning.strip() and not content
    (report,) = [chunk["metadata"]["claa"] for chunk in chunks if chunk.get("metadata")]
    assert has_own_rate(report)


# --- every route ---


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", routes.PRUNES, ids=lambda route: route.path)
def test_what_a_body_asks_counts_on_every_route(served: Server, route: routes.Route, stream: bool) -> None:
    prompt = text(f"{route.path} {stream}")

    def asked(**claa: Any) -> dict[str, Any]:
        answer = route_bodies.post(served, route, prompt, claa, stream=stream)
        return route_bodies.report_of(route, answer, stream)

    half, off, auto = asked(keep_rate=0.5), asked(enabled=False), asked(policy="auto", keep_rate=1.0)
    assert half["pruned"] and half["kept_tokens"] == int(0.5 * half["prompt_tokens"])
    assert not off["pruned"] and off["reason"] == "disabled by request"
    # What others had cached, and estimates made of it, are shown where SGLang shows it.
    everything = route.path in route_bodies.SHOWS_CACHED
    assert ["early_cached_tokens" in report for report in (half, off, auto)] == [everything] * 3
    assert not auto["pruned"] and ("estimated" in auto["reason"]) == everything


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", routes.PRUNES, ids=lambda route: route.path)
def test_preferred_options_count_where_a_body_leaves_them_out(
    served: Server, route: routes.Route, stream: bool
) -> None:
    """The server prefers `return_kept`; a body's own options are merged with it, key by key."""
    prompt = text(f"preferred {route.path} {stream}")
    for claa, is_kept in (({}, True), ({"keep_rate": 0.4}, True), ({"keep_rate": 0.4, "return_kept": False}, False)):
        report = route_bodies.report_of(route, route_bodies.post(served, route, prompt, claa, stream=stream), stream)
        assert ("kept" in report) == is_kept, (claa, report)
        assert report["keep_rate"] == claa.get("keep_rate", KEEP_RATE), (claa, report)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", routes.PRUNES, ids=lambda route: route.path)
def test_what_no_route_can_do_is_a_400(served: Server, route: routes.Route, stream: bool) -> None:
    bad = route_bodies.post(served, route, "hi", {"keep_rate": 7}, stream=stream)
    assert bad.status_code == 400 and "claa.keep_rate" in bad.text and "at most 1" in bad.text, bad.text
    elsewhere = "custom_params" if route.place != "custom_params" else "sampling_params.custom_params"
    lost = route_bodies.post(served, route, "hi", {"enabled": False}, stream=stream, place=elsewhere)
    assert lost.status_code == 400 and f"give it in {route.place}" in lost.text, lost.text


def test_a_given_position_beyond_the_prompt_is_an_error_on_every_route(served: Server) -> None:
    for route in routes.PRUNES:
        for stream in (False, True) if route.path != "/v1/responses" else (False,):
            answer = route_bodies.post(served, route, "hi", {"keep": [100_000]}, stream=stream)
            assert "beyond the prompt" in answer.text and (stream or answer.status_code == 400), route


def test_routes_that_never_prune_answer_400_to_options_or_to_anything(served: Server) -> None:
    body = {"model": MODEL, "query": "q", "items": [" a"], "label_token_ids": [1], "documents": ["d"]}
    for path in ("/v1/score", "/v1/rerank"):
        answer = served.post(path, {**body, "custom_params": {"claa": {"enabled": True}}})
        assert answer.status_code == 400 and "this route does not prune" in answer.text, answer.text
    for path in ("/encode", "/classify", "/v1/embeddings", "/v1/classify"):
        assert served.post(path, {"model": MODEL, "text": "x", "input": "x"}).status_code == 400


# --- /server_info ---


def test_server_info(served: Server) -> None:
    info = served.get("/server_info").json()["claa"]
    steps = [{"prune_layer": PRUNE_LAYER, "keep_rate": KEEP_RATE, "score_layers": SCORE_LAYERS}]
    assert info["config"]["steps"] == steps and info["config"]["min_prompt_tokens"] == MIN_PROMPT
    assert info["hooks"]["ok"] and info["hooks"]["server"] > 5 and info["hooks"]["scheduler"] > 5
    assert info["config"]["scorer"] == "auto" and info["scorer"]["scorer"] == "torch"
    slots = info["late_slots"]
    assert 0 < slots["free"] <= slots["total"] and slots["held"] == 0
    served.flush()
    assert served.get("/server_info").json()["claa"]["late_slots"]["free"] == slots["total"]


# --- /metrics ---


def test_requests_are_counted_with_what_became_of_them(served: Server) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": text("counted chat")}], "max_tokens": 2}
    with (
        counting(served, "sglang:claa_requests_total", "outcome", "reason") as requests,
        counting(served, "sglang:claa_prompt_tokens_total", "part") as tokens,
        counting(served, "sglang:claa_cached_tokens_total", "namespace") as cached,
        counting(served, "sglang:claa_time_to_first_token_seconds_count", "outcome") as first_tokens,
    ):
        answers = served.generate(text=[text("counted"), text("short", 1)], sampling_params=GREEDY)
        answers.append(served.generate(text=text("counted"), sampling_params=GREEDY))
        answers.append(served.generate(text=text("counted"), sampling_params=options(enabled=False)))
        assert served.post("/v1/chat/completions", chat).status_code == 200
        assert served.post("/generate", {"text": "x", "sampling_params": options(keep_rate=7)}).status_code == 400
    stages = [scrape(served, f"sglang:claa_{stage}_seconds_total") for stage in ("score", "prune")]
    assert all(sum(seconds.values()) > 0 for seconds in stages)
    pruned, again = claa_of(answers[0]), claa_of(answers[2])
    assert requests == {("pruned", "asked"): 3, ("dense", "short_prompt"): 1, ("dense", "opted_out"): 1}
    assert first_tokens == {("pruned",): 3, ("dense",): 2}
    assert tokens["kept",] > 2 * pruned["kept_tokens"] and tokens["dropped",] > 2 * tokens["kept",]
    # The chat may share its template with what others asked.
    assert cached["pruned",] >= again["early_cached_tokens"] > MIN_PROMPT
    labels = scrape(served, "sglang:claa_requests_total", "model_name", "engine_type")
    assert set(labels) == set(scrape(served, "sglang:num_requests_total", "model_name", "engine_type"))
