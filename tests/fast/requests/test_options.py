"""Per-request options: what each may be, and that every refusal names the key and what is allowed."""

from __future__ import annotations

import math
from types import MappingProxyType

import msgspec
import pytest

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.requests.options import (
    RequestError,
    RequestOptions,
    check_decoding,
    check_explain,
    check_keep,
    parse_options,
)


@pytest.mark.parametrize("custom_params", [None, {}, {"other": object()}, {"claa": {}}, {"claa": None}])
def test_nothing_asked_gives_the_defaults(custom_params: object) -> None:
    assert parse_options(custom_params) == RequestOptions(enabled=True, keep_rate=None, return_kept=False)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"enabled": False}, RequestOptions(enabled=False)),
        ({"keep_rate": 0.4}, RequestOptions(keep_rate=0.4)),
        ({"keep_rate": 1}, RequestOptions(keep_rate=1.0)),
        ({"keep_rate": None, "return_kept": True}, RequestOptions(return_kept=True)),
        ({"finish": False}, RequestOptions(finish=False)),
        ({"finish": True}, RequestOptions()),
        ({"decode_dense_layers": 0}, RequestOptions(decode_dense_layers=0)),
        ({"explain": True, "explain_window": 1024}, RequestOptions(explain=True, explain_window=1024)),
        ({"explain": False, "explain_window": None}, RequestOptions()),
        (MappingProxyType({"keep_rate": 1e-9}), RequestOptions(keep_rate=1e-9)),
    ],
)
def test_options_are_read(asked: object, expected: RequestOptions) -> None:
    got = parse_options({"claa": asked, "__req__": object()})
    assert got == expected
    assert got.keep_rate is None or type(got.keep_rate) is float


NOT_A_RATE = [True, False, "0.4", [0.4], {"rate": 0.4}, b"0.4", math.nan, math.inf, -math.inf]
OUT_OF_RANGE = [0, 0.0, -0.1, 1.0000001, 2, 10**400, 10**5000]


@pytest.mark.parametrize("value", NOT_A_RATE + OUT_OF_RANGE, ids=lambda value: type(value).__name__)
def test_a_bad_keep_rate_is_refused_with_its_range(value: object) -> None:
    with pytest.raises(RequestError, match=r"custom_params\.claa\.keep_rate: .* above 0 and at most 1"):
        parse_options({"claa": {"keep_rate": value}})


@pytest.mark.parametrize("key", ["enabled", "return_kept", "finish", "explain"])
@pytest.mark.parametrize("value", [0, 1, "true", "", None, [True], {}, 0.0], ids=repr)
def test_a_bad_switch_is_refused_with_its_values(key: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"custom_params\.claa\.{key}: .* true or false"):
        parse_options({"claa": {key: value}})


@pytest.mark.parametrize("key", ["keep_rat", "Enabled", "", "window", 3, None, ("keep_rate",)], ids=repr)
def test_an_unknown_key_is_refused_with_the_known_ones(key: object) -> None:
    with pytest.raises(RequestError, match="unknown key .*enabled .*keep_rate .*return_kept .*finish ") as caught:
        parse_options({"claa": {"enabled": True, key: 0.4}})
    assert repr(key)[1:-1] in str(caught.value)


@pytest.mark.parametrize("value", [[], "claa", 1, True, 0, "", [("keep_rate", 0.4)]], ids=repr)
def test_what_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match=r"custom_params\.claa: expected an object"):
        parse_options({"claa": value})
    with pytest.raises(RequestError, match="custom_params: expected an object"):
        parse_options(value)


def test_given_positions_exclude_other_ways_to_say_what_is_kept() -> None:
    assert parse_options({"claa": {"keep": [0, 3, 9]}}).keep == (0, 3, 9)
    for other in ({"keep_rate": 0.5}, {"ranker": "fastkv"}):
        with pytest.raises(RequestError, match="keep: says what is kept; leave out"):
            parse_options({"claa": {"keep": [1], **other}})
    for wrong in ([], [3, 3], [4, 2], [-1], ["1"], [True], 3):
        with pytest.raises(RequestError, match="keep"):
            parse_options({"claa": {"keep": wrong}})


def test_given_positions_beyond_the_prompt() -> None:
    options = parse_options({"claa": {"keep": [0, 9]}})
    check_keep(options, 10)
    with pytest.raises(RequestError, match="position 9 is beyond the prompt of 9 tokens"):
        check_keep(options, 9)


def test_a_ranker_is_checked() -> None:
    assert parse_options({"claa": {"ranker": "claa:heads=sum"}}).ranker == "claa:heads=sum"
    with pytest.raises(RequestError, match="custom_params.claa.ranker: .*no such name"):
        parse_options({"claa": {"ranker": "snapkv"}})


def test_layers_that_decode_over_kept_tokens_are_the_servers_or_none() -> None:
    step = PruneStep(prune_layer=5, keep_rate=0.2, score_layers=(5,))
    without = ClaaConfig(steps=(step,), num_layers=8)
    restricted = msgspec.structs.replace(without, decode_dense_layers=2)
    for layers, config in (
        (None, without),
        (None, restricted),
        (2, restricted),
        (6, restricted),
        (6, without),
        (7, without),
    ):
        check_decoding(RequestOptions(decode_dense_layers=layers), config)
    for layers in (0, 1, 3, 5):
        with pytest.raises(RequestError, match=f"decode_dense_layers: {layers}: .* 2; give 2, or 6 or more"):
            check_decoding(RequestOptions(decode_dense_layers=layers), restricted)
    with pytest.raises(RequestError, match="without --claa-decode-dense-layers; give 6 or more"):
        check_decoding(RequestOptions(decode_dense_layers=2), without)


@pytest.mark.parametrize("value", [0, -1, 1025, True, "8", 8.5])
def test_an_explained_window_has_a_range(value: object) -> None:
    with pytest.raises(RequestError, match=r"explain_window: .* 1 to 1024 tokens"):
        parse_options({"claa": {"explain": True, "explain_window": value}})


def test_an_explained_window_is_part_of_an_explanation() -> None:
    for asked in ({"explain_window": 8}, {"explain_window": 8, "explain": False}):
        with pytest.raises(RequestError, match="explain_window: .* add explain"):
            parse_options({"claa": asked})


def test_a_request_is_explained_where_the_server_allows_it_and_there_is_room() -> None:
    step = PruneStep(prune_layer=5, keep_rate=0.2, score_layers=(5,))
    closed = ClaaConfig(steps=(step,), num_layers=8)
    allowed = msgspec.structs.replace(closed, allow_explain=True)
    asked, wide = RequestOptions(explain=True), RequestOptions(explain=True, explain_window=100)
    check_explain(RequestOptions(), closed, 10, 64)
    check_explain(asked, allowed, 10, 64)
    for tokens, most in ((101, 100), (None, 100), (101, None), (None, None)):
        check_explain(wide, allowed, tokens, most)
    with pytest.raises(RequestError, match="without --claa-allow-explain; start it with that flag, or leave"):
        check_explain(asked, closed, 10, 64)
    with pytest.raises(RequestError, match="100 tokens leave nothing to look at in a prompt of 100; give fewer"):
        check_explain(wide, allowed, 100, 100)
    with pytest.raises(RequestError, match="give at most 99, or start the server with a larger --chunked-prefill"):
        check_explain(wide, allowed, 200, 99)
