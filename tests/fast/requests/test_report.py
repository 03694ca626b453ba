"""Reports and metadata, on SGLang's own classes, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from claa_sglang.config.config import ClaaConfig
from claa_sglang.patches import ask, attached, openai, report, tokenizer
from claa_sglang.requests.options import RequestError, RequestOptions
from claa_sglang.requests.report import CHOSEN, FINISHED, KEY, build_report, safe_report
from claa_sglang.requests.state import RequestState
from tests.fast.states import CONFIG, SECOND, STEP, pruned

# --- the report ---


def test_report_of_a_pruned_request() -> None:
    assert build_report(pruned(), cached_tokens=16) == {
        "pruned": True,
        "prompt_tokens": 80,
        "kept_tokens": 20,
        "early_cached_tokens": 16,
        "late_computed_tokens": 20,
        "ranker": "claa",
        "keep_rate": 0.25,
        "prune_layer": 3,
        "score_layers": [1, 2, 3],
    }


def test_report_of_a_dense_request() -> None:
    state = RequestState.dense_request(RequestOptions(), 7, "short")
    assert build_report(state, cached_tokens=3) == {
        "pruned": False,
        "reason": "short",
        "prompt_tokens": 7,
        "kept_tokens": 7,
        "early_cached_tokens": 3,
    }


def test_report_of_an_observed_request() -> None:
    state = RequestState.observed_request(RequestOptions(return_kept=True), CONFIG, 80)
    assert state.observed and not state.pruned
    report = build_report(state, cached_tokens=3)
    assert report["pruned"] is False and report["reason"].startswith("observed: ") and report["would_keep"] is None
    assert (report["kept_tokens"], report["early_cached_tokens"]) == (80, 3)
    kept = list(range(60, 80))
    state.progress.kept[0] = torch.tensor(kept)
    found = pruned(return_kept=True)
    would = build_report(found, 0)
    assert build_report(state, 0)["would_keep"] == {
        key: would[key] for key in ("ranker", "kept_tokens", "keep_rate", "prune_layer", "score_layers", "kept")
    }
    assert "would_keep" not in build_report(RequestState.dense_request(RequestOptions(), 80, "short"), 0)


def test_report_of_a_request_after_a_finished_prefix() -> None:
    state = RequestState.dense_request(RequestOptions(), 700, "its first 640 tokens were finished")
    state.decision.finished = 640
    assert build_report(state, cached_tokens=699) == {
        "pruned": False,
        "reason": "its first 640 tokens were finished",
        "prompt_tokens": 700,
        "kept_tokens": 700,
        "early_cached_tokens": 699,
        "finished_tokens": 640,
    }
    for none in (0, None):
        state.decision.finished = none
        assert "finished_tokens" not in build_report(state, 0)


def test_a_pruned_request_says_nothing_of_what_was_finished() -> None:
    state = pruned()
    state.decision.finished = 640
    assert build_report(state, 0) == build_report(pruned(), 0)


def test_kept_positions_are_reported_only_when_asked_for() -> None:
    assert "kept" not in build_report(pruned(), 0)
    kept = build_report(pruned(return_kept=True), 0)["kept"]
    assert kept == list(range(60, 80)) and all(type(position) is int for position in kept)


def test_positions_that_were_never_ranked_are_left_out() -> None:
    state = pruned(return_kept=True)
    state.progress.kept[0] = None
    assert "kept" not in build_report(state, 0)


def test_several_steps_are_listed_and_the_first_is_on_top() -> None:
    config = ClaaConfig(steps=(STEP, SECOND), num_layers=8, window=8, min_prompt_tokens=32)
    values = build_report(pruned(config=config, return_kept=True), 0)
    assert [step["prune_layer"] for step in values["steps"]] == [3, 5]
    assert [len(step["kept"]) for step in values["steps"]] == [20, 10]
    assert {name: values[name] for name in values["steps"][0]} == values["steps"][0]
    assert "steps" not in build_report(pruned(), 0)


def test_the_request_s_own_keep_rate_is_reported() -> None:
    assert build_report(pruned(keep_rate=0.5), 0)["keep_rate"] == 0.5


def test_a_report_is_json() -> None:
    values = build_report(pruned(return_kept=True), 0)
    assert msgspec.json.decode(msgspec.json.encode(values)) == values == json.loads(json.dumps(values))


def test_a_broken_state_is_an_error_in_the_report_and_no_exception() -> None:
    made = pruned()
    state = replace(made, plan=replace(made.plan, kept_counts=()))
    assert safe_report(state, 0) == {"error": "IndexError: tuple index out of range"}
    assert safe_report(None, 0) is None


# --- scheduler output ---


def finished_request(state: RequestState | None, finished: bool = True) -> Any:
    from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req

    req = Req.__new__(Req)  # its constructor needs a running scheduler; the streamer reads three attributes
    req.cached_tokens, req.finished_reason = 5, FINISH_LENGTH(1) if finished else None
    if state is not None:
        attached.state.hang(req, state)
    return req


def streamer(base: type | None = None) -> Any:
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

    unused: Any = None
    return report.reporting(base or SchedulerOutputStreamer)(
        send_to_detokenizer=unused,
        tree_cache=unused,
        server_args=unused,
        is_generation=True,
        spec_algorithm=unused,
        disaggregation_mode=unused,
        enable_hicache_storage=unused,
    )


def test_only_requests_that_finish_are_reported() -> None:
    reqs = [finished_request(pruned()), finished_request(pruned(), False), finished_request(None)]
    info = streamer().build_additional_customized_info(reqs)
    assert info == {KEY: [[build_report(pruned(), 5)], [], []]}
    assert streamer().build_additional_customized_info(reqs[1:2]) == {}


def test_another_plugin_s_streamer_keeps_its_fields() -> None:
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

    class Other(SchedulerOutputStreamer):
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list) -> dict[str, list]:
            return {"other": [[1] for _ in reqs]}

    made = streamer(Other)
    assert made.should_build_additional_customized_info() and made.has_additional_customized_info
    assert set(made.build_additional_customized_info([finished_request(pruned())])) == {"other", KEY}
    assert set(made.build_additional_customized_info([finished_request(pruned(), False)])) == {"other"}


# --- tokenizer manager ---


def test_a_report_is_one_dict_and_other_values_accumulate_as_in_sglang() -> None:
    from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager

    state = ReqState.__new__(ReqState)
    state.customized_info_accumulated, state.customized_info_reported_keys = {}, set()
    manager, original = TokenizerManager.__new__(TokenizerManager), TokenizerManager.update_request_meta_info
    for reports, expected in (([[], []], {"other": [1]}), ([[], [{"pruned": True}]], {"other": [1, 1]})):
        meta_info: dict[str, Any] = {}
        info = {"other": [[0], [1]], KEY: reports}
        tokenizer.take_report(original, manager, meta_info, state, info, 1, None)
        assert {key: value for key, value in meta_info.items() if key != KEY} == expected
    assert meta_info[KEY] == {"pruned": True}
    # SGLang slices what is accumulated, and a dict cannot be sliced.
    assert KEY not in state.customized_info_accumulated


@pytest.mark.parametrize("bad", [{"keep_rate": 0}, {"keep_rate": 1.5}, {"keep_rate": "0.4"}, {"nope": 1}])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
def test_a_bad_generate_body_names_the_key(bad: dict[str, Any], batch: bool) -> None:
    params: Any = {"custom_params": {KEY: bad}}
    body = {"input_ids": [1], "sampling_params": [{}, params] if batch else params}
    error = tokenizer.check_generate_body(None, body)
    assert error and next(iter(bad)) in error and "at most 1" in error


@pytest.mark.parametrize(
    "body",
    [None, [], "x", {}, {"sampling_params": 3}, {"sampling_params": [3, None]}, {"sampling_params": {}}],
)
def test_other_bodies_are_left_to_sglang(body: Any) -> None:
    assert tokenizer.check_generate_body(None, body) is None
    assert tokenizer.check_generate_body("already wrong", body) == "already wrong"


@pytest.mark.parametrize("given", [{}, {"custom_params": None}, {"custom_params": {KEY: {"return_kept": True}}}])
def test_preferred_options_reach_the_request_key_by_key(given: dict[str, Any]) -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    manager = TokenizerManager.__new__(TokenizerManager)
    manager.preferred_sampling_params = {"custom_params": {KEY: {"keep_rate": 0.5}}}
    obj = GenerateReqInput(sampling_params=given)
    tokenizer.check_request(manager, obj, None)
    # As SGLang merges them next.
    merged = {**manager.preferred_sampling_params, **obj.sampling_params}  # type: ignore[dict-item]
    own = (given.get("custom_params") or {}).get(KEY) or {}
    assert merged["custom_params"][KEY] == {"keep_rate": 0.5, **own}
    with pytest.raises(RequestError, match="keep_rate"):
        wrong = GenerateReqInput(sampling_params={"custom_params": {KEY: {"keep_rate": 7}}})
        tokenizer.check_request(manager, wrong, None)


@pytest.mark.parametrize("stream", [False, True])
def test_the_vertex_route_is_checked_where_generate_is(stream: bool) -> None:
    params = {"custom_params": {KEY: {"keep_rate": 7}}}
    body = {"instances": [{"text": "x"}], "parameters": {"sampling_params": params, "stream": stream}}
    assert "at most 1" in (tokenizer.check_generate_body(None, body) or "")
    misplaced = {"instances": [{"text": "x"}], **params}
    assert "give it in parameters" in (
        tokenizer.check_generate_body(None, misplaced | {"custom_params": {KEY: {}}}) or ""
    )


# --- OpenAI ---


def chunk(index: int, finish_reason: str | None, text: str = 'a "finish_reason":"stop" }') -> str:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish_reason}
    return f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n"


def test_the_chunk_that_ends_a_choice_gets_its_report() -> None:
    event = openai.with_report(chunk(1, "stop"), {0: {"pruned": False}, 1: {"pruned": True}})
    assert event.endswith("\n\n")
    parsed = json.loads(event.removeprefix("data: "))
    assert parsed.pop("metadata") == {KEY: {"pruned": True}}
    assert parsed == json.loads(chunk(1, "stop").removeprefix("data: "))


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(chunk(0, None), id="not the end"),
        pytest.param(chunk(1, "stop"), id="another choice"),
        pytest.param("data: [DONE]\n\n", id="done"),
        pytest.param('data: {"choices":[],"usage":{}}\n\n', id="usage"),
        pytest.param('data: {"error":{"message":"x"}}\n\n', id="error"),
        pytest.param('event: sglext_ids\ndata: {"choices":[]}\n\n', id="named event"),
        pytest.param("data: {not json}\n\n", id="no JSON"),
        pytest.param(": keep-alive\n\n", id="comment"),
    ],
)
def test_other_chunks_stay_as_they_are(event: str) -> None:
    assert openai.with_report(event, {0: {"pruned": True}}) == event


@pytest.mark.usefixtures("cache_report")
def test_a_stream_collects_reports_from_the_outputs_it_is_made_of_and_closes_them() -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    closed = []

    async def outputs(_manager: Any, _obj: Any, _request: Any) -> Any:
        try:
            yield {"meta_info": {}}
            yield {"meta_info": {KEY: {"pruned": True}}}
        finally:
            closed.append("outputs")

    async def events(_serving: Any, obj: Any, _request: Any, _raw: Any) -> Any:
        async for output in openai.watch(outputs, None, obj, None):
            yield chunk(0, "stop" if KEY in output["meta_info"] else None)

    async def run(limit: int) -> list[str]:
        stream = openai.stream_with_metadata(events, None, GenerateReqInput(input_ids=[1]), None, None)
        seen = [event async for event, _ in _zip(stream, range(limit))]
        await stream.aclose()
        return seen

    first, last = asyncio.run(run(2))
    assert "metadata" not in first and '"metadata":{"claa":{"pruned":true}}' in last
    assert len(asyncio.run(run(1))) == 1 and len(closed) == 2


async def _zip(stream: Any, limit: range) -> Any:
    for number in limit:
        yield await anext(stream), number


def test_outputs_of_other_routes_pass_untouched() -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    marker = object()
    assert openai.watch(lambda *_: marker, None, GenerateReqInput(input_ids=[1])) is marker


@pytest.fixture(params=[False, True], ids=["", "cache report"])
def cache_report(request: pytest.FixtureRequest) -> Iterator[bool]:
    """SGLang's own switch, off and on."""
    from sglang.srt.runtime_context import get_context

    with get_context().override_server_args(enable_cache_report=request.param):
        yield request.param


def test_what_depends_on_the_cache_is_shown_with_sglang_s_switch_alone(cache_report: bool) -> None:
    why = "pruned 1 ms, dense 2 ms (estimated)"
    dense, chosen = RequestState.dense_request(RequestOptions(), 7, why), pruned()
    chosen.decision.why = dense.decision.why = why
    for state in (dense, chosen):
        report = build_report(state, 16)
        seen = ask.as_shown(report)
        if cache_report:
            assert seen == report and seen["early_cached_tokens"] == 16 and "estimated" in seen["reason"]
        else:
            expected = {**report, "reason": CHOSEN}
            del expected["early_cached_tokens"]
            assert seen == expected and seen["policy"] == "auto"
    short = build_report(RequestState.dense_request(RequestOptions(), 7, "short"), 3)
    assert ask.as_shown(short)["reason"] == "short" and build_report(pruned(), 3).get("policy") is None


@pytest.mark.parametrize(("why", "shown"), [(None, FINISHED), ("estimated", CHOSEN)], ids=["always", "auto"])
def test_so_is_what_was_finished(cache_report: bool, why: str | None, shown: str) -> None:
    """Without the switch it is neither said how many tokens an earlier request had cached, nor what that was worth."""
    state = RequestState.dense_request(RequestOptions(), 700, "its first 640 tokens were finished: estimated")
    state.decision.finished, state.decision.why = 640, why
    report = build_report(state, 699)
    seen = ask.as_shown(report)
    if cache_report:
        assert seen == report and seen["finished_tokens"] == 640
    else:
        hidden = {"early_cached_tokens", "finished_tokens"}
        assert seen == {**{key: value for key, value in report.items() if key not in hidden}, "reason": shown}
        assert "640" not in str(seen) and "estimated" not in str(seen)


@pytest.mark.parametrize("reports", [[{"pruned": True}], [{"pruned": True}, {"pruned": False}]])
def test_metadata_of_a_whole_response(reports: list[dict], cache_report: bool) -> None:
    from sglang.srt.entrypoints.openai.protocol import CompletionResponse, UsageInfo

    response = CompletionResponse(id="x", model="m", choices=[], usage=UsageInfo(), metadata={"weight_version": "w"})
    ret = [{"meta_info": {KEY: report}} for report in reports]
    made = openai.add_metadata(response, None, None, ret, 0)
    assert made.metadata == {"weight_version": "w", KEY: reports if len(reports) > 1 else reports[0]}
    response.metadata = None
    assert openai.add_metadata(response, None, None, [{"meta_info": {}}], 0).metadata is None


def test_an_error_response_stays_as_it_is() -> None:
    from fastapi.responses import ORJSONResponse

    response = ORJSONResponse({"error": "x"})
    made = openai.add_metadata(response, None, None, [{"meta_info": {KEY: {}}}], 0)
    assert made is response and not hasattr(made, "metadata")
