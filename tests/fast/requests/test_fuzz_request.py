"""Whatever a client writes for `custom_params`, it is either what was meant or a short refusal that names the key.

The meaning is written down once more here, in plain Python (`expected`), and the parser must agree with it on every
value that JSON or msgpack can bring.
"""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from claa_sglang.patches.tokenizer import check_generate_body
from claa_sglang.requests.options import RequestError, RequestOptions, parse_options

LONGEST = 700  # characters of a refusal: all allowed keys, and what was given, cut
SWITCHES = ("enabled", "return_kept")
KEYS = (*SWITCHES, "keep_rate")

NUMBERS = (
    st.integers()
    | st.floats()
    | st.floats(0, 1)
    | st.sampled_from([0, 1, -0.0, 5e-324, math.nextafter(1, 2), math.nan, math.inf, 2**64, 10**400])
)
TEXTS = (
    st.text(max_size=8)
    | st.sampled_from(["\ud800", "\udfff\ud800", "true", "0.4", "1", "\0", "\x1b[31m\n", "\u202e", "é" * 500])
    | st.sampled_from([*KEYS, "keep-rate", "keepRate", "Enabled ", "ke\u0435p_rate", "KEEP_RATE"])
)
# msgpack brings bytes, times and keys that are no strings, besides what JSON has.
LEAVES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | TEXTS
    | st.binary(max_size=8)
    | st.sampled_from([datetime.datetime(2025, 11, 1), msgspec.msgpack.Ext(5, b"x"), ()])
)
ANY_KEY = st.sampled_from(KEYS) | TEXTS | st.integers() | st.none() | st.booleans() | st.binary(max_size=4)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_KEY, inner, max_size=4), max_leaves=8
)
# What somebody who coerces values would take for a switch or a rate.
ALMOST = st.sampled_from(
    [
        "true",
        "false",
        "",
        "0.4",
        "1",
        "on",
        b"1",
        0,
        1,
        0.0,
        1.0,
        2,
        True,
        False,
        None,
        [],
        [0.4],
        {},
        {"keep_rate": 0.4},
    ]
)
SWITCH = st.booleans() | ALMOST | VALUES
CLAA = (
    st.fixed_dictionaries(
        {},
        optional={"enabled": SWITCH, "keep_rate": st.floats(0, 1) | ALMOST | NUMBERS | VALUES, "return_kept": SWITCH},
    )
    | st.dictionaries(ANY_KEY, VALUES, max_size=4)
    | VALUES
)
CUSTOM_PARAMS = st.fixed_dictionaries({"claa": CLAA}) | VALUES
OPTIONS = st.builds(
    RequestOptions,
    enabled=st.booleans(),
    keep_rate=st.none() | st.floats(0, 1, exclude_min=True),
    return_kept=st.booleans(),
)


def is_rate(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= 1  # type: ignore[operator]


def wrong_keys(claa: dict) -> set:
    """The keys of `claa` that cannot be accepted: unknown ones, and those whose value is none of theirs."""
    return {
        key
        for key, value in claa.items()
        if not (
            (type(key) is str and key in SWITCHES and type(value) is bool)
            or (type(key) is str and key == "keep_rate" and (value is None or is_rate(value)))
        )
    }


def refusals(custom_params: Any) -> list[str] | None:
    """How the refusal of `custom_params` may begin; None if they are acceptable."""
    if custom_params is None:
        return None
    if not isinstance(custom_params, dict):
        return ["custom_params: expected an object, got "]
    claa = custom_params.get("claa")
    if claa is None:
        return None
    if not isinstance(claa, dict):
        return ["custom_params.claa: expected an object, got "]
    names = [f"custom_params.claa.{k}: got " if k in KEYS else "unknown key " for k in wrong_keys(claa)]
    return [name.replace("unknown", "custom_params.claa: unknown") for name in names] or None


def assert_presentable(text: str) -> None:
    """It can be the body of an HTTP 400, a line of a log, and read by a person."""
    assert text.isascii() and text.isprintable() and len(text) <= LONGEST
    json.dumps({"error": text}, ensure_ascii=False).encode()


def check(custom_params: Any) -> None:
    """What `parse_options` makes of it is what was written, or a refusal that names a key that is wrong."""
    may_say = refusals(custom_params)
    try:
        options = parse_options(custom_params)
    except RequestError as error:
        assert may_say and str(error).startswith(tuple(may_say)), (may_say, str(error))
        assert_presentable(str(error))
        return
    assert may_say is None
    claa = (custom_params or {}).get("claa") or {}
    assert options.enabled is claa.get("enabled", True) and options.return_kept is claa.get("return_kept", False)
    rate = claa.get("keep_rate")
    assert (options.keep_rate is None) == (rate is None)
    assert rate is None or (type(options.keep_rate) is float and options.keep_rate == rate)


@settings(deadline=None, max_examples=250)
@given(CUSTOM_PARAMS)
@example({"claa": {"\ud800": 1}})
@example({"claa": {"keep_rate": "\ud800", "enabled": 1}})
@example({"claa": {"keep_rate": True}})
@example({"claa": {b"keep_rate": 0.4}})
@example({"claa": {"keep_rate": 1, True: 1}})
def test_it_is_what_was_written_or_a_refusal_that_names_the_key(custom_params: Any) -> None:
    check(custom_params)


def nested(depth: int, *, objects: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"claa": value} if objects else [value]
    return value


# Too large for hypothesis, which prints what it tries.
HUGE: dict[str, Any] = {
    "a number of 5,000 digits": -(10**5000),
    "10 MB of text": "\u00e9" * 10_000_000,
    "10 MB of bytes": b"\0" * 10_000_000,
    "100,000 lists, one in the other": nested(100_000, objects=False),
    "100,000 objects, one in the other": nested(100_000, objects=True),
    "an object of 100,000 keys": dict.fromkeys(range(100_000)),
    "a list of 100,000": list(range(100_000)),
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_a_huge_value_is_refused_in_a_short_text(value: Any) -> None:
    for wrong in (value, {"claa": value}, {"claa": {"keep_rate": value}}, {"claa": {"x": 1, "enabled": value}}):
        check(wrong)
    if value.__hash__:
        check({"claa": {value: 1}})


@settings(deadline=None, max_examples=150)
@given(OPTIONS)
def test_options_survive_the_way_they_travel(options: RequestOptions) -> None:
    written = msgspec.to_builtins(options)
    for encoded in (
        json.loads(json.dumps({"claa": written, "other": 1})),
        msgspec.msgpack.decode(msgspec.msgpack.encode({"claa": written})),
        {"claa": {key: value for key, value in written.items() if value is not None}},
    ):
        assert parse_options(encoded) == options


def has_options(value: Any) -> bool:
    return isinstance(value, dict) and value.get("claa") is not None


BODY = st.fixed_dictionaries(
    {},
    optional={
        "sampling_params": st.fixed_dictionaries({"custom_params": CUSTOM_PARAMS})
        | st.lists(st.fixed_dictionaries({"custom_params": CUSTOM_PARAMS}) | VALUES, max_size=4)
        | VALUES,
        "custom_params": CUSTOM_PARAMS,
        "stream": VALUES,
    },
)


@settings(deadline=None, max_examples=120)
@given(BODY | VALUES)
@example({"sampling_params": [{}, {"custom_params": {"claa": {"keep_rate": math.nan}}}, {"custom_params": 3}]})
@example({"sampling_params": [[{"custom_params": 3}]]})
def test_a_generate_body_is_refused_for_its_first_bad_parameters_and_nothing_else(body: Any) -> None:
    params = body.get("sampling_params") if isinstance(body, dict) else None
    items = params if isinstance(params, list) else [params]
    may_say = [refusals(item.get("custom_params")) for item in items if isinstance(item, dict)]
    first = next((says for says in may_say if says), None)
    error = check_generate_body(None, body)
    elsewhere = isinstance(body, dict) and next((p for p in (body, body.get("custom_params")) if has_options(p)), None)
    if first is None and elsewhere:
        assert error is not None and "give it in sampling_params.custom_params" in error
        assert_presentable(error)
    elif first is None:
        assert error is None
    else:
        assert error is not None and error.startswith(tuple(first))
        assert_presentable(error)
    # What SGLang found wrong with a body comes first, whatever else there is.
    assert check_generate_body("SGLang's own error", body) == "SGLang's own error"


def test_a_hostile_repr_does_no_harm() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(RequestError, match="keep_rate"):
        parse_options({"claa": {"keep_rate": Hostile()}})
