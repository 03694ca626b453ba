"""Bad input over HTTP: a clear error for whoever sent it, and right answers for everybody else all the while.

What SGLang itself answers is the yardstick: the statuses are those of a stock server (0.5.23) that was sent the same
bodies. Ours differs where it answers HTTP 400: an empty text, an empty prompt in a batch and token ids outside the
vocabulary end a stock server; ids of another shape than the texts beside them are HTTP 500 there; and its /generate
ignores `custom_params` that are no object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from claa_sglang.requests import routes
from tests import route_bodies, tiny_models
from tests.answers import ONE_THREAD, STRICT, Ask, ask, check, check_idle
from tests.bad_input import Company, raised_by_us, send
from tests.engine.conftest import CLAA_FLAGS
from tests.engine_server import Server, server
from tests.reference_model import ReferenceModel

pytestmark = pytest.mark.engine

MODEL = route_bodies.MODEL
POOL = 6000  # tokens; fewer than the context has
CONTEXT = tiny_models.MAX_POSITIONS
WINDOW = 32
DEFAULT_RATE = 0.5
FLAGS = (
    *("--max-total-tokens", str(POOL), "--chunked-prefill-size", "256", "--served-model-name", MODEL),
    *("--preferred-sampling-params", json.dumps({"custom_params": {"claa": {"keep_rate": DEFAULT_RATE}}})),
    "--enable-cache-report",
)
OPTED_OUT = {"custom_params": {"claa": {"enabled": False}}}
GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Server]:
    with server(model, *CLAA_FLAGS, *FLAGS, env=STRICT | ONE_THREAD) as running:
        yield running


@pytest.fixture(scope="module")
def company(served: Server, llama_reference: ReferenceModel) -> Iterator[Company]:
    sending = Company(served, llama_reference)
    sending.start()
    yield sending
    sending.stop()


@pytest.fixture(autouse=True)
def others(company: Company) -> Iterator[None]:
    """After every test: the server lives, and nobody else's answer was harmed."""
    yield
    if company.is_alive():
        company.check()


def body(stream: bool, params: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"sampling_params": {**GREEDY, **params}, "stream": stream, **fields}


both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
pruned_or_not = pytest.mark.parametrize("params", [{}, OPTED_OUT], ids=["pruned", "dense"])


# --- prompts


@both_ways
@pytest.mark.parametrize("length", [1, 2, WINDOW, WINDOW + 1])
def test_the_shortest_prompts(served: Server, llama_reference: ReferenceModel, length: int, stream: bool) -> None:
    asked = Ask(tiny_models.prompt(length, seed=length), keep=0.3, new=4)
    if stream:
        sent = {"input_ids": asked.prompt, "sampling_params": asked.params(), "stream": True}
        assert send(served, "/generate", sent)[0] == 200
    answer = ask(served, asked)
    assert answer.report["pruned"] == (length > WINDOW)
    if length > WINDOW:
        check(answer, llama_reference.pruned(asked.prompt, answer.tokens, 0.3))
    else:
        check(answer, llama_reference.dense(asked.prompt, answer.tokens))


@pruned_or_not
def test_a_prompt_that_fits_the_pool_is_answered(served: Server, params: dict[str, Any]) -> None:
    """Also where its late slots do not fit beside it: SGLang would have answered it, so it is."""
    for length in (4700, POOL - 10):
        asked = Ask(tiny_models.prompt(length, seed=90), keep=None if params else 0.3, new=2)
        assert ask(served, asked).report["prompt_tokens"] == length


LONG = {
    "the pool": (POOL, "maximum allowed length"),
    "more than the pool": (POOL + 1, "maximum allowed length"),
    "almost the context": (CONTEXT - 5, "maximum allowed length"),
    "the context": (CONTEXT, "context length"),
    "more than the context": (CONTEXT + 1, "context length"),
    "four contexts": (4 * CONTEXT, "context length"),
}


@both_ways
@pruned_or_not
def test_a_prompt_too_long(served: Server, params: dict[str, Any], stream: bool) -> None:
    for name, (length, says) in LONG.items():
        sent = body(stream, params, input_ids=tiny_models.prompt(length, seed=91))
        status, text = send(served, "/generate", sent)
        assert status == 400 and says in text and str(length) in text, (name, status, text[:500])


FINE = tiny_models.prompt(20, seed=92)
BAD_PROMPTS: dict[str, Any] = {
    "none": {},
    "null": {"input_ids": None},
    "empty": {"input_ids": []},
    "empty, in a batch": {"input_ids": [[]]},
    "empty, beside another": {"input_ids": [FINE, []]},
    "empty, first": {"input_ids": [[], FINE]},
    "null, in a batch": {"input_ids": [FINE, None]},
    "empty text": {"text": ""},
    "empty texts": {"text": ["", ""]},
    "an empty text": {"text": ["harbour", ""]},
    "-1": {"input_ids": [*FINE, -1]},
    "-1 alone": {"input_ids": [-1]},
    "the vocabulary's size": {"input_ids": [tiny_models.VOCAB_SIZE, *FINE]},
    "one bad, in a batch": {"input_ids": [FINE, [*FINE, tiny_models.VOCAB_SIZE], FINE]},
    "2**31": {"input_ids": [2**31] * 20},
    "-2**40": {"input_ids": [-(2**40)] * 20},
    "2**63 - 1": {"input_ids": [2**63 - 1] * 20},
    "2**63": {"input_ids": [2**63] * 20},
    "10**30": {"input_ids": [10**30] * 20},
    "a fraction": {"input_ids": [*FINE, 1.5]},
    "floats": {"input_ids": [1.0] * 20},
    "strings": {"input_ids": ["1"] * 20},
    "nulls": {"input_ids": [None] * 20},
    "bools": {"input_ids": [True] * 20},
    "a list too many": {"input_ids": [[FINE]]},
    "a list among ids": {"input_ids": [1, [2]]},
    "an id among lists": {"input_ids": [[1], 2]},
    "a number": {"input_ids": 5},
    "a string": {"input_ids": "abc"},
    "an object": {"input_ids": {"a": 1}},
    "text that is no text": {"text": 5},
    "ids for several texts": {"text": ["a", "b"], "input_ids": [1, 2]},
    "lists of ids for a text": {"text": "a", "input_ids": [[1], [2]]},
}


@both_ways
@pruned_or_not
def test_a_bad_prompt(served: Server, params: dict[str, Any], stream: bool) -> None:
    for name, prompt in BAD_PROMPTS.items():
        status, text = send(served, "/generate", body(stream, params, **prompt))
        assert status == 400 and len(text) < 5000, (name, status, text[:500])


# --- options


def objects(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


# value -> what the refusal names; None where it is no JSON, so that nobody gets to see the key
BAD_OPTIONS: dict[str, tuple[Any, str | None]] = {
    "a string": ('"on"', "custom_params.claa"),
    "a number": (1, "custom_params.claa"),
    "a bool": (False, "custom_params.claa"),
    "a list": ([["keep_rate", 0.5]], "custom_params.claa"),
    "an unknown key": ({"keeprate": 0.5}, "keeprate"),
    "an empty key": ({"": 0.5}, "unknown key ''"),
    "a key in other letters": ({"Keep_Rate": 0.5}, "Keep_Rate"),
    "a flag": ({"window": 8}, "window"),
    "zero": ({"keep_rate": 0}, "keep_rate"),
    "negative": ({"keep_rate": -0.1}, "keep_rate"),
    "above one": ({"keep_rate": 1.0000001}, "keep_rate"),
    "a rate as text": ({"keep_rate": "0.5"}, "keep_rate"),
    "a rate as a bool": ({"keep_rate": True}, "keep_rate"),
    "a rate as a list": ({"keep_rate": [0.5]}, "keep_rate"),
    "a rate as an object": ({"keep_rate": {"step": 0.5}}, "keep_rate"),
    "100 digits": (f'{{"keep_rate": 1{"0" * 100}}}', "keep_rate"),
    "300 deep": (f'{{"keep_rate": {objects(300)}}}', "keep_rate"),
    "1 MB of text": ({"keep_rate": "x" * 2**20}, "keep_rate"),
    "1 MB of list": ({"keep_rate": [0] * 2**19}, "keep_rate"),
    "1 MB of key": ({"y" * 2**20: 1}, "yyy"),
    "a switch as a number": ({"enabled": 1}, "enabled"),
    "a switch as text": ({"enabled": "false"}, "enabled"),
    "a switch as null": ({"return_kept": None}, "return_kept"),
    "a switch as a list": ({"return_kept": [True]}, "return_kept"),
    "the second of two": ('{"keep_rate": 0.5}, "claa": {"keep_rate": 9}', "keep_rate"),
    "control characters": ({"\x00\n\x1b[31m": 1}, "unknown key"),
    "not a number": ('{"keep_rate": NaN}', None),
    "infinity": ('{"keep_rate": -Infinity}', None),
    "1e400": ('{"keep_rate": 1e400}', None),
    "half a character": ('{"keep_rate": "\\ud800"}', None),
    "not closed": ('{"keep_rate": 0.5', None),
}
# route -> path, and body with words in capitals to be filled in
ROUTES: dict[str, tuple[str, str]] = {
    "generate": ("/generate", '{"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, CUSTOM}, STREAM}'),
    "generate, n=2": ("/generate", '{"text": "hi", "sampling_params": {"max_new_tokens": 4, "n": 2, CUSTOM}, STREAM}'),
    "generate, batch": (
        "/generate",
        '{"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 4}, {"max_new_tokens": 4, CUSTOM}], STREAM}',
    ),
    "completions": ("/v1/completions", '{"model": "default", "max_tokens": 4, "prompt": "hi", CUSTOM, STREAM}'),
    "completions, batch": (
        "/v1/completions",
        '{"model": "default", "max_tokens": 4, "prompt": [[1], [2]], CUSTOM, STREAM}',
    ),
    "chat": ("/v1/chat/completions", '{"model": "default", "max_tokens": 4, "messages": MESSAGES, CUSTOM, STREAM}'),
}
MESSAGES = '[{"role": "user", "content": "hi"}]'


def on_route(route: str, custom_params: str, stream: bool) -> tuple[str, str]:
    """Path and body of a request with these `custom_params`, given as JSON text."""
    path, text = ROUTES[route]
    filled = {
        "MESSAGES": MESSAGES,
        "STREAM": f'"stream": {json.dumps(stream)}',
        "CUSTOM": f'"custom_params": {custom_params}',
    }
    for word, value in filled.items():
        text = text.replace(word, value)
    return path, text


@both_ways
@pytest.mark.parametrize("route", ROUTES)
def test_bad_options(served: Server, route: str, stream: bool) -> None:
    for name, (claa, says) in BAD_OPTIONS.items():
        written = claa if isinstance(claa, str) else json.dumps(claa)
        status, text = send(served, *on_route(route, f'{{"claa": {written}}}', stream))
        assert status == 400, (name, status, text[:500])
        assert says is None or (says in text and "custom_params.claa" in text and len(text) < 1000), (name, text[:1500])


@both_ways
@pytest.mark.parametrize("route", ROUTES)
def test_explain_without_the_flag(served: Server, route: str, stream: bool) -> None:
    status, text = send(served, *on_route(route, '{"claa": {"explain": true}}', stream))
    assert status == 400 and "without --claa-allow-explain" in text, text[:500]


@both_ways
@pytest.mark.parametrize("route", ROUTES)
def test_good_options_in_odd_writing(served: Server, route: str, stream: bool) -> None:
    for claa in (
        "null",
        "{}",
        '{"keep_rate": null}',
        '{"keep_rate": 1}',
        '{"keep_rate": 1e-300}',
        '{"keep_rate": 9E-1}',
    ):
        status, text = send(served, *on_route(route, f'{{"claa": {claa}}}', stream))
        assert status == 200, (claa, status, text[:500])


@both_ways
@pytest.mark.parametrize("route", ROUTES)
def test_custom_params_that_are_no_object(served: Server, route: str, stream: bool) -> None:
    for custom_params in ('"claa"', "[1]", "3", "true"):
        status, text = send(served, *on_route(route, custom_params, stream))
        assert status == 400 and "custom_params" in text, (custom_params, status, text[:500])


# --- the server's own options


@both_ways
@pytest.mark.parametrize("route", routes.PRUNES, ids=lambda route: route.path)
def test_the_server_s_default_counts_key_by_key_on_every_route(
    served: Server, route: routes.Route, stream: bool
) -> None:
    """And what was cached is reported on every route, as this server shows it."""
    for claa, rate in (
        (None, DEFAULT_RATE),
        ({"return_kept": True}, DEFAULT_RATE),
        ({"keep_rate": 0.75}, 0.75),
        ({"keep_rate": None}, 0.2),
        ({"keep": [3]}, None),
        ({"enabled": False}, "dense"),
    ):
        answer = route_bodies.post(served, route, "harbour " * 12, claa, stream=stream)
        report = route_bodies.report_of(route, answer, stream)
        assert report.get("keep_rate", "dense") == rate and "early_cached_tokens" in report, (claa, report)
        assert ("kept" in report) == bool(claa and claa.get("return_kept")), (claa, report)


# --- bodies


BODIES = [b"", b"hello", b"null", b"1", b"[]", b'"x"', b'{"input_ids": [1, 2', b"\xff\xfe{}", b"[" * 100_000, b"{}x"]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_what_is_no_request(served: Server, path: str) -> None:
    for sent in (*BODIES, b'{"a":' * 5000 + b"1" + b"}" * 5000):
        status, text = send(served, path, sent)
        # A stock server, too, has no better answer to a chat that is JSON and no object.
        no_object = path.startswith("/v1/chat") and sent in (b"null", b"1", b"[]", b'"x"')
        assert status in ((400, 500) if no_object else (400,)), (sent[:50], status, text[:500])


# Random bodies have the fields that reach our code. Odd values of the others are SGLang's own to refuse, and a stock
# server answers some with HTTP 500: `sampling_params` that are a list beside one prompt or shorter than the batch (sent
# here all the same), and `custom_params` of its other users nested 900 deep.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
LENGTHS = {"max_new_tokens": st.integers(0, 4), "temperature": st.just(0)}
PROMPT = st.lists(st.integers(0, tiny_models.VOCAB_SIZE - 1), min_size=1, max_size=40)
GOOD_CLAA = st.fixed_dictionaries(
    {}, optional={"keep_rate": st.floats(0.01, 1), "enabled": st.booleans(), "return_kept": st.booleans()}
)
GOOD_PARAMETERS = st.fixed_dictionaries(
    LENGTHS, optional={"custom_params": st.fixed_dictionaries({"claa": GOOD_CLAA}), "n": st.integers(1, 3)}
)
GOOD_REQUEST = st.fixed_dictionaries(
    {"input_ids": PROMPT, "sampling_params": GOOD_PARAMETERS}, optional={"stream": st.booleans()}
)
ODD_PROMPT = PROMPT | st.lists(st.integers(-3, tiny_models.VOCAB_SIZE + 3), max_size=30) | ANYTHING
ODD_CLAA = st.fixed_dictionaries(
    {},
    optional={"keep_rate": st.floats(-1, 2) | ANYTHING, "enabled": st.booleans() | ANYTHING, "return_kept": ANYTHING},
)
ODD_PARAMETERS = st.fixed_dictionaries(
    LENGTHS,
    optional={
        "custom_params": st.fixed_dictionaries({"claa": ODD_CLAA | ANYTHING}) | ANYTHING,
        "n": st.integers(-1, 3),
    },
)
ODD_REQUEST = st.fixed_dictionaries(
    {"sampling_params": GOOD_PARAMETERS | ODD_PARAMETERS | st.lists(ODD_PARAMETERS, max_size=3)},
    optional={
        "input_ids": ODD_PROMPT | st.lists(ODD_PROMPT, max_size=3),
        "text": st.text(max_size=20) | st.lists(st.text(max_size=20), max_size=3),
        "stream": st.booleans() | ANYTHING,
        "custom_params": ANYTHING,
    },
)


def test_random_bodies(served: Server) -> None:
    began, statuses = len(served.log()), []

    @settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(GOOD_REQUEST | ODD_REQUEST | ODD_REQUEST | ANYTHING)
    def sent(request: Any) -> None:
        status, text = send(served, "/generate", request)
        statuses.append(status)
        assert served.process.poll() is None
        assert status == 200 or 400 <= status <= 500, (status, text[:500])

    sent()
    assert statuses.count(200) > 20 and statuses.count(400) > 50, statuses
    time.sleep(1)  # until the last traceback is written
    ours = raised_by_us(served.log()[began:])
    assert not ours, ours[0][-2500:]


# --- afterwards


def test_nothing_is_left(served: Server, company: Company) -> None:
    """Last of the module."""
    company.check()
    company.stop()
    assert not company.wrong
    check_idle(served)
    assert served.get("/health_generate").status_code == 200
