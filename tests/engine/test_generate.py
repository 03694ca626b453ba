"""What a client of `/generate` sees: options, refusals, reports and namespaces, on a real server."""

from __future__ import annotations

from typing import Any

import pytest

from tests import tiny_models
from tests.answers import ONE_THREAD
from tests.engine_server import Server, server
from tests.route_bodies import MODEL
from tests.routes_server import GREEDY, KEEP_RATE, MIN_PROMPT, claa_of, events, options, text

pytestmark = pytest.mark.engine
WINDOW = 32


@pytest.fixture(scope="module")
def served(routes_server: Server) -> Server:
    return routes_server


# --- reports ---


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
