"""What a client sees: options, refusals, reports, namespaces and server info, on every route of a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from claa_sglang.requests import routes
from tests import documents, route_bodies, tiny_models
from tests.answers import ONE_THREAD
from tests.engine_server import Server, server

pytestmark = pytest.mark.engine

MODEL = route_bodies.MODEL
MIN_PROMPT = 64
KEEP_RATE = 0.3
FLAGS = (
    "--enable-claa",
    *("--claa-profile", "none"),
    *("--claa-policy", "always"),
    *("--claa-finish", "off"),
    *("--claa-keep-rate", str(KEEP_RATE)),
    *("--claa-prune-layer", "19"),
    *("--claa-score-layers", "17,18"),
    *("--claa-min-prompt-tokens", str(MIN_PROMPT)),
    *("--served-model-name", MODEL),
    "--enable-custom-logit-processor",
    "--sleep-on-idle",
)
SENTENCE = "The ferry crosses the bay four times a day, and the harbour master writes every crossing down. "
GREEDY = {"temperature": 0, "max_new_tokens": 4}
WINDOW = 32


@pytest.fixture(scope="module")
def served(small_model_path: Path) -> Iterator[Server]:
    with server(small_model_path, *FLAGS, env=ONE_THREAD) as running:
        assert "answers can suffer" not in running.log(), "its layers are given as flags"
        running.started = len(running.log())  # type: ignore[attr-defined]
        yield running


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


# --- what the documents show ---


def as_served(code: str, url: str) -> str:
    """A client snippet that asks the server at `url` for its model, whatever port and model the document names."""
    code = re.sub(r"https?://(?:localhost|127\.0\.0\.1|0\.0\.0\.0)(?::\d+)?", url, code)
    return re.sub(r"(\bmodel[\"']?\s*[=:]\s*)[\"'][^\"']+[\"']", rf'\1"{MODEL}"', code)


CLIENTS = [block for block in documents.blocks("python") if as_served(block.text, "") != as_served(block.text, "x")]


@pytest.mark.parametrize("block", CLIENTS, ids=lambda block: block.where)
def test_client_snippets_of_the_documents_run(
    served: Server, block: documents.Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(documents.ROOT)
    exec(compile(as_served(block.text, served.url), block.where, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip(), f"{block.where}: it prints nothing"


def test_sample_reports_of_the_documents_have_the_keys_of_a_report(served: Server) -> None:
    pruned = claa_of(served.generate(text=text("documents"), sampling_params=options(return_kept=True)))
    dense = claa_of(served.generate(text=text("documents"), sampling_params=options(enabled=False)))
    known = {True: {*pruned, "reason", "steps"}, False: {*dense}}
    for block in documents.blocks("json"):
        for report in reports_in(json.loads(block.text)):
            unknown = {*report} - known[report["pruned"]]
            assert not unknown, f"{block.where}: a report has no {', '.join(sorted(unknown))}"
            needed = known[report["pruned"]] - {"kept", "reason", "steps"}
            assert needed <= {*report}, f"{block.where}: a report also has {', '.join(sorted(needed - {*report}))}"


def reports_in(value: Any) -> Iterator[dict[str, Any]]:
    """The reports anywhere inside a JSON value."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from reports_in(inner)
    if isinstance(value, dict) and "pruned" in value:
        yield value


def test_a_snippet_is_made_to_ask_the_served_model() -> None:
    shown = 'OpenAI(base_url="http://localhost:30000/v1")\npost("http://127.0.0.1:1/x", json={"model": "M/1", "n": 1})'
    assert as_served(shown, "http://h:7") == (
        f'OpenAI(base_url="http://h:7/v1")\npost("http://h:7/x", json={{"model": "{MODEL}", "n": 1}})'
    )
    assert as_served("create(model='a', n=1)", "u") == f'create(model="{MODEL}", n=1)'
    assert list(reports_in({"meta_info": {"claa": {"pruned": False}}, "n": [1]})) == [{"pruned": False}]


# --- reports on /generate ---


def test_a_pruned_request_reports_what_was_kept(served: Server) -> None:
    answer = served.generate(text=text("kept", 20), sampling_params=options(return_kept=True))
    report, tokens = claa_of(answer), answer["meta_info"]["prompt_tokens"]
    kept = report.pop("kept")
    assert report == {
        "pruned": True,
        "prompt_tokens": tokens,
        "kept_tokens": int(KEEP_RATE * tokens),
        "early_cached_tokens": 0,
        "late_computed_tokens": int(KEEP_RATE * tokens),
        "ranker": "claa",
        "keep_rate": KEEP_RATE,
        "prune_layer": 19,
        "score_layers": [17, 18],
    }
    assert kept == sorted(set(kept)) and len(kept) == report["kept_tokens"]
    assert kept[0] == 0 and kept[-WINDOW:] == list(range(tokens - WINDOW, tokens))


def test_a_cached_prefix_is_reported_as_sglang_counts_it(served: Server) -> None:
    for expected_hit in (False, True):
        answer = served.generate(text=text("twice", 10), sampling_params=GREEDY)
        cached = claa_of(answer)["early_cached_tokens"]
        assert cached == answer["meta_info"]["cached_tokens"] and (cached > MIN_PROMPT) == expected_hit


@pytest.mark.parametrize(
    "ranker", ["claa:paper", "claa:zscore=off,heads=sum", "fastkv", "gemfilter", "last-query", "uniform"]
)
def test_a_request_s_own_ranker(served: Server, ranker: str) -> None:
    base = claa_of(served.generate(text=text("ranker", 20), sampling_params=options(return_kept=True)))
    first = served.generate(text=text("ranker", 20), sampling_params=options(ranker=ranker, return_kept=True))
    report = claa_of(first)
    assert report["ranker"] == ranker and report["kept_tokens"] == base["kept_tokens"]
    assert report["kept"] != base["kept"]
    # The same positions, given: whatever ranks, the rest of the way is the same.
    given = served.generate(text=text("ranker", 20), sampling_params=options(keep=report["kept"], return_kept=True))
    assert given["output_ids"] == first["output_ids"]
    assert claa_of(given) == {**report, "ranker": "given", "keep_rate": None} | {
        "early_cached_tokens": claa_of(given)["early_cached_tokens"]
    }


def test_the_first_token_and_the_window_are_kept_beside_given_positions(served: Server) -> None:
    report = claa_of(served.generate(text=text("given"), sampling_params=options(keep=[3, 40], return_kept=True)))
    tokens = report["prompt_tokens"]
    assert report["kept"] == [0, 3, 40, *range(tokens - WINDOW, tokens)]
    assert report["late_computed_tokens"] == 3 + WINDOW


def test_policy_auto_chooses_and_says_why(served: Server) -> None:
    report = claa_of(served.generate(text=text("auto", 40), sampling_params=options(policy="auto")))
    assert report["pruned"] == report["reason"].startswith("pruned is faster: pruned ")
    assert "ms (estimated)" in report["reason"]
    everything = claa_of(served.generate(text=text("all", 40), sampling_params=options(policy="auto", keep_rate=1.0)))
    assert not everything["pruned"] and everything["reason"].startswith("dense is not slower: pruned ")


@pytest.mark.parametrize(
    ("sentences", "more", "says"),
    [
        pytest.param(5, {"sampling_params": options(enabled=False)}, "disabled", id="opted out"),
        pytest.param(2, {}, f"shorter than {MIN_PROMPT}", id="short"),
        pytest.param(5, {"return_logprob": True, "logprob_start_len": 0}, "input logprobs", id="logprobs"),
        pytest.param(5, {"sampling_params": {**GREEDY, "beam_width": 2}}, "beam", id="beam search"),
    ],
)
def test_what_runs_dense_says_so(served: Server, sentences: int, more: dict[str, Any], says: str) -> None:
    answer = served.generate(text=text(f"dense {says}", sentences), **{"sampling_params": GREEDY, **more})
    answer = answer[0] if isinstance(answer, list) else answer
    report, tokens = claa_of(answer), answer["meta_info"]["prompt_tokens"]
    assert says in report.pop("reason")
    assert report == {
        "pruned": False,
        "prompt_tokens": tokens,
        "kept_tokens": tokens,
        "early_cached_tokens": answer["meta_info"]["cached_tokens"],
    }


def test_output_logprobs_are_no_reason_to_run_dense(served: Server) -> None:
    answer = served.generate(text=text("output"), sampling_params=GREEDY, return_logprob=True)
    assert claa_of(answer)["pruned"] and len(answer["meta_info"]["output_token_logprobs"]) == 4


def test_a_session_runs_dense(served: Server) -> None:
    session = served.post("/open_session", {"capacity_of_str_len": 10_000}).json()
    answer = served.generate(text=text("session"), sampling_params=GREEDY, session_params={"id": session})
    assert "session" in claa_of(answer)["reason"]
    served.post("/close_session", {"session_id": session})


def test_a_score_request_is_answered(served: Server) -> None:
    body = {"model": MODEL, "query": text("score"), "items": [" yes", " no"], "label_token_ids": [1, 2]}
    answer = served.post("/v1/score", body)
    assert answer.status_code == 200 and len(answer.json()["scores"]) == 2, answer.text


def test_each_item_of_a_batch_has_its_own_report(served: Server) -> None:
    params = [options(enabled=False), options(keep_rate=0.5, return_kept=True), GREEDY]
    answers = served.generate(text=[text("one"), text("two"), text("three", 2)], sampling_params=params)
    reports = [claa_of(answer) for answer in answers]
    assert [report["pruned"] for report in reports] == [False, True, False]
    assert len(reports[1]["kept"]) == reports[1]["kept_tokens"]
    assert [r["prompt_tokens"] for r in reports] == [a["meta_info"]["prompt_tokens"] for a in answers]


def test_each_sample_has_its_own_report(served: Server) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 4, "n": 3}
    answers = served.generate(text=text("samples"), sampling_params=params)
    assert len(answers) == 3 and all(claa_of(answer)["pruned"] for answer in answers)
    # SGLang computes the prompt once, for all of them.
    assert all(claa_of(answer)["early_cached_tokens"] > MIN_PROMPT for answer in answers)


def test_a_stream_reports_once_at_its_end(served: Server) -> None:
    body = {"text": text("stream"), "sampling_params": options(return_kept=True), "stream": True}
    chunks = events(served.post("/generate", body))
    assert len(chunks) > 1 and ["claa" in chunk["meta_info"] for chunk in chunks[:-1]] == [False] * (len(chunks) - 1)
    assert len(claa_of(chunks[-1])["kept"]) == claa_of(chunks[-1])["kept_tokens"]


def test_incremental_streams_report_too(tiny_model: Any) -> None:
    """SGLang slices accumulated values in this mode; the server must survive a report among them."""
    flags = ("--enable-claa", "--claa-policy", "always", "--claa-min-prompt-tokens", "32")
    more = ("--incremental-streaming-output", "--skip-tokenizer-init")
    with server(tiny_model("llama"), *flags, *more, env=ONE_THREAD) as running:
        for seed in (0, 1):
            body = {"input_ids": tiny_models.prompt(80, seed), "sampling_params": GREEDY, "stream": True}
            chunks = events(running.post("/generate", body))
            assert sum(len(chunk["output_ids"]) for chunk in chunks) == 4
            assert claa_of(chunks[-1])["pruned"] and "claa" not in chunks[0]["meta_info"]


# --- refusals ---


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("claa", "says", "remedy"),
    [
        pytest.param({"keep_rate": 0}, "keep_rate", "at most 1", id="zero"),
        pytest.param({"keep_rate": 1.01}, "keep_rate", "at most 1", id="above one"),
        pytest.param({"keeprate": 0.5}, "keeprate", "at most 1", id="unknown"),
        pytest.param({"enabled": "no"}, "enabled", "true or false", id="a string"),
        pytest.param({"ranker": "snapkv"}, "ranker", "give claa, last-query", id="no such ranker"),
        pytest.param({"policy": "never"}, "policy", "must be", id="no such policy"),
        pytest.param({"keep": [5, 3]}, "keep", "sort them", id="positions that do not ascend"),
    ],
)
def test_bad_options_are_a_400_that_names_the_key(
    served: Server, claa: dict[str, Any], says: str, remedy: str, stream: bool
) -> None:
    bad = {"claa": claa}
    native = {"temperature": 0, "custom_params": bad}
    completion = {"model": MODEL, "max_tokens": 4, "stream": stream, "custom_params": bad}
    chat = {**completion, "messages": [{"role": "user", "content": "hi"}]}
    bodies = [
        ("/generate", {"text": "hi", "sampling_params": native, "stream": stream}),
        ("/generate", {"text": ["hi", "ho"], "sampling_params": [{}, native], "stream": stream}),
        ("/generate", {"text": "hi", "sampling_params": {**native, "n": 2}, "stream": stream}),
        ("/v1/completions", {**completion, "prompt": "hi"}),
        ("/v1/completions", {**completion, "prompt": ["hi", "ho"], "n": 2}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "n": 2}),
    ]
    for path, body in bodies:
        answer = served.post(path, body)
        assert answer.status_code == 400, f"{path}: {answer.status_code} {answer.text}"
        assert says in answer.text and remedy in answer.text, answer.text
    assert served.get("/health_generate").status_code == 200


def test_an_aborted_long_prompt_leaves_the_namespace_clean(served: Server) -> None:
    """SGLang runs an aborted request on one token; its KV must not become a prefix of pruned requests."""
    ids = [0, *range(200, 300)]
    before = served.generate(input_ids=ids, sampling_params=options(return_kept=True))
    served.flush()
    body = {"input_ids": ids, "sampling_params": GREEDY, "return_logprob": True, "logprob_start_len": 10_000}
    assert served.post("/generate", body).status_code == 400
    after = served.generate(input_ids=ids, sampling_params=options(return_kept=True))
    assert after["output_ids"] == before["output_ids"]
    assert claa_of(after)["early_cached_tokens"] == 0 and claa_of(after)["kept"] == claa_of(before)["kept"]


# --- other users of custom_params, and namespaces ---


def test_other_processors_get_their_custom_params(served: Server) -> None:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    prompt = text("processor")
    first = served.generate(text=prompt, sampling_params=GREEDY)["output_ids"][0]
    params = options(keep_rate=0.5)
    params["custom_params"]["token_ids"] = [first]
    processor = DisallowedTokensLogitsProcessor().to_str()
    answer = served.generate(text=prompt, sampling_params=params, custom_logit_processor=processor)
    assert first not in answer["output_ids"] and claa_of(answer)["keep_rate"] == 0.5


@pytest.mark.parametrize("field", ["extra_key", "cache_salt"])
def test_client_namespaces_stay_apart(served: Server, field: str) -> None:
    def cached(value: str | None) -> int:
        more = {} if value is None else {field: value}
        return claa_of(served.generate(text=text(field), sampling_params=GREEDY, **more))["early_cached_tokens"]

    assert [cached(value) > MIN_PROMPT for value in (None, "a", "b", "a", "b", None)] == [False] * 3 + [True] * 3


def test_a_client_cannot_name_the_pruned_namespace(served: Server) -> None:
    prompt, dense = text("forged"), options(enabled=False)
    namespace = served.get("/server_info").json()["claa"]["config"]["namespace"]
    expected = served.generate(text=prompt, sampling_params=dense)["output_ids"]
    assert claa_of(served.generate(text=prompt, sampling_params=GREEDY))["pruned"]
    forged = served.generate(text=prompt, sampling_params=dense, extra_key=namespace)
    assert claa_of(forged)["early_cached_tokens"] == 0 and forged["output_ids"] == expected


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
    steps = [{"prune_layer": 19, "keep_rate": KEEP_RATE, "score_layers": [17, 18]}]
    assert info["config"]["steps"] == steps and info["config"]["min_prompt_tokens"] == MIN_PROMPT
    assert info["hooks"]["ok"] and info["hooks"]["server"] > 5 and info["hooks"]["scheduler"] > 5
    assert info["config"]["scorer"] == "auto" and info["scorer"]["scorer"] == "torch"
    slots = info["late_slots"]
    assert 0 < slots["free"] <= slots["total"] and slots["held"] == 0
    served.flush()
    assert served.get("/server_info").json()["claa"]["late_slots"]["free"] == slots["total"]


def test_nothing_went_wrong_on_the_way(served: Server) -> None:
    """Last of the module: no exception was logged by anything above (SGLang logs those in streams of /v1/responses)."""
    log = served.log()[served.started :]  # type: ignore[attr-defined]
    assert "Traceback" not in log and served.get("/health_generate").status_code == 200
