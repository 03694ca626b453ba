"""Where a body says what it asks, which places are refused, and what the server's own options add."""

from __future__ import annotations

from typing import Any

import pytest

from claa_sglang import body
from claa_sglang.requests.options import RequestError, parse_options

HALF = {"claa": {"keep_rate": 0.5}}
DEFAULTS = {"temperature": 0.5, "custom_params": {"other": 1, **HALF}}


def at(place: str, value: Any) -> dict[str, Any]:
    for name in reversed(place.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("place", [body.TOP, body.SAMPLING, body.OPTIONS, body.PARAMETERS])
def test_options_are_read_at_the_place_of_the_route_and_refused_at_any_other(place: str) -> None:
    assert body.check_body(at(place, HALF), place) == {"keep_rate": 0.5}
    assert body.check_body(at(place, {"other": 1}), place) is None
    with pytest.raises(RequestError, match=r"custom_params\.claa\.keep_rate: got 7 .* at most 1"):
        body.check_body(at(place, {"claa": {"keep_rate": 7}}), place)
    for other in {*body.PLACES} - {place}:
        with pytest.raises(RequestError, match=f"^{other}.claa: not read on this route; give it in {place}$"):
            body.check_body(at(other, {"claa": {"enabled": False}}), place)
        assert body.check_body(at(other, {"claa": None}), place) is None
    with pytest.raises(RequestError, match=f"top of a body; give it in {place}"):
        body.check_body(HALF, place)


def test_a_route_that_does_not_prune_takes_no_options() -> None:
    for place in body.PLACES:
        with pytest.raises(RequestError, match="leave it out: this route does not prune"):
            body.check_body(at(place, {"claa": {"enabled": True}}), None)
    assert body.check_body({"query": "q", "custom_params": {"other": 1}}, None) is None


@pytest.mark.parametrize("odd", [None, [], "x", 3, {}, {"options": [3, None]}, {"options": {"custom_params": None}}])
def test_bodies_without_options(odd: Any) -> None:
    assert body.check_body(odd, body.OPTIONS) is None


def test_parameters_of_a_batch_are_each_checked() -> None:
    batch = {"sampling_params": [{}, {"custom_params": HALF}, {"custom_params": {"claa": {"nope": 1}}}]}
    with pytest.raises(RequestError, match="unknown key 'nope'"):
        body.check_body(batch, body.SAMPLING)


@pytest.mark.parametrize(
    ("own", "claa"),
    [
        (None, {"keep_rate": 0.5}),  # what the OpenAI routes send where a body has none
        ({}, {"keep_rate": 0.5}),
        ({"claa": None}, {"keep_rate": 0.5}),
        ({"claa": {"return_kept": True}}, {"keep_rate": 0.5, "return_kept": True}),
        ({"claa": {"keep_rate": 0.7}}, {"keep_rate": 0.7}),
        ({"claa": {"keep_rate": None}}, {"keep_rate": None}),
        ({"claa": {"enabled": False}}, {"keep_rate": 0.5, "enabled": False}),
        ({"claa": {"keep": [1]}}, {"keep": [1]}),
        ({"claa": {"keep": None}}, {"keep_rate": 0.5, "keep": None}),
    ],
)
def test_defaults_count_key_by_key(own: Any, claa: dict[str, Any]) -> None:
    merged = body.with_defaults(own, DEFAULTS)
    assert merged == {"claa": claa}
    parse_options(merged)
    assert DEFAULTS["custom_params"] == {"other": 1, **HALF}


def test_other_users_of_custom_params_are_left_alone() -> None:
    assert body.with_defaults({"x": 2}, DEFAULTS) == {"x": 2, **HALF}
    own = {"x": 2}
    for preferred in (
        None,
        {},
        {"custom_params": None},
        {"custom_params": {"other": 1}},
        {"custom_params": HALF["claa"]},
    ):
        assert body.with_defaults(own, preferred) is own and body.with_defaults(None, preferred) is None
    for wrong in (3, "claa", [HALF]):
        assert body.with_defaults(wrong, DEFAULTS) is wrong
        assert body.with_defaults({"claa": wrong}, DEFAULTS) == {"claa": wrong}


@pytest.mark.parametrize("good", [None, {}, {"temperature": 0.2}, {"custom_params": None}, DEFAULTS])
def test_good_defaults(good: Any) -> None:
    assert body.wrong_defaults(good) is None


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (
            {"custom_params": {"claa": {"keep_rate": 7}}},
            "custom_params.claa.keep_rate: got 7 (int), must be a",
        ),
        ({"custom_params": {"claa": {"keeprate": 0.5}}}, "unknown key 'keeprate'"),
        ({"custom_params": {"claa": "on"}}, "custom_params.claa: expected an object"),
        ({"custom_params": "claa"}, "custom_params: expected an object"),
        ({"custom_params": {"claa": {"ranker": "snapkv"}}}, "no such name"),
        ({"custom_params": {"claa": {"keep": [0, 500]}}}, "positions are those of one prompt"),
        ([DEFAULTS], "expected an object"),
    ],
)
def test_bad_defaults_are_named_with_their_range(bad: Any, says: str) -> None:
    assert says in (body.wrong_defaults(bad) or "")
