"""Whatever the profile file is, its values are used as they are written in it, or the refusal names file and remedy."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import claa_sglang
from claa_sglang.config.config import ClaaConfig, ConfigError
from claa_sglang.config.flags import ClaaFlags, resolve
from claa_sglang.config.profile_file import MAX_PROFILE_BYTES
from tests.fast.config.profiles import PROFILE, TWO_STEPS
from tests.fast.consistent import assert_consistent

LAYERS = 30
SHIPPED = Path(claa_sglang.__file__).parent / "profiles" / "smollm2-135m-instruct.json"
WHOLE = {
    "shipped": SHIPPED.read_bytes(),
    "every value": json.dumps(PROFILE).encode(),
    "two steps": json.dumps(
        {**PROFILE, "steps": TWO_STEPS, "provenance": {"wo": "Köln \n"}}, ensure_ascii=False
    ).encode(),
    "least": b'{"version":1,"model":{"num_layers":30}}',
}
REMEDIES = (
    "Give the path of a readable profile file",
    "Write it again (a calibration does), or give the values as flags without --claa-profile",
    "Use the profile of this model, or none",
    "correct it, or leave it out",
)
DEFAULTS = {"window": 32, "pool_kernel": 7, "ranker": "claa", "min_prompt_tokens": 1024}
# One file per test, written anew for every example.
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def refused(path: str, num_layers: int = LAYERS, **flags: Any) -> str | None:
    """The text of the refusal, which names file and remedy and can be printed; None if there is none."""
    try:
        assert_consistent(resolve(ClaaFlags(profile=path, **flags), num_layers), num_layers)
    except ConfigError as error:
        text = str(error)
        assert f"--claa-profile {path}" in text and any(remedy in text for remedy in REMEDIES), text
        rest = text.replace(path, "")
        assert rest.isprintable() and len(rest) < 1500
        return text
    return None


def check(file: Path, content: bytes, num_layers: int = LAYERS) -> ClaaConfig | None:
    """The configuration with a profile of that content, which is what the content says; None if it is refused."""
    file.write_bytes(content)
    if refused(str(file), num_layers) is not None:
        return None
    config = resolve(ClaaFlags(profile=str(file)), num_layers)
    written = json.loads(content)
    assert written["version"] == 1 and written["model"]["num_layers"] == num_layers
    # A calibration that names no ranker measured the paper's rule.
    defaults = DEFAULTS | ({"ranker": "claa:paper"} if "made by" in written.get("provenance", {}) else {})
    assert {name: getattr(config, name) for name in defaults} == {k: written.get(k, v) for k, v in defaults.items()}
    for step, given_step in zip(config.steps, written.get("steps") or [{}], strict=True):
        layer = given_step.get("prune_layer", num_layers // 2 - 1)
        last_four = list(range(max(0, layer - 3), layer + 1))
        assert step.prune_layer == layer and step.keep_rate == given_step.get("keep_rate", 0.2)
        assert list(step.score_layers) == given_step.get("score_layers", last_four)
    return config


# --- bytes


@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE)
def test_cut_at_every_byte(whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "cut.json"
    assert check(file, whole)
    for end in reversed(range(len(whole.rstrip()))):
        os.truncate(file, end)
        assert refused(str(file))


@fuzz
@given(
    whole=st.sampled_from(list(WHOLE.values())),
    edits=st.lists(
        st.tuples(st.sampled_from(["flip", "insert", "delete", "repeat"]), st.floats(0, 1), st.binary(max_size=4)),
        min_size=1,
        max_size=3,
    ),
)
def test_damaged_bytes(tmp_path: Path, whole: bytes, edits: list[tuple[str, float, bytes]]) -> None:
    content = bytearray(whole)
    for kind, where, new in edits:
        at = int(where * len(content))
        if kind == "insert":
            content[at:at] = new
        elif kind == "delete":
            del content[at : at + len(new) + 1]
        elif kind == "repeat":
            content[at:at] = content[at : at + 50]
        elif at < len(content):
            content[at] ^= new[0] if new else 1
    check(tmp_path / "damaged.json", bytes(content))


@fuzz
@given(whole=st.sampled_from(list(WHOLE.values())), digits=st.lists(st.integers(0, 9), min_size=40, max_size=40))
def test_other_digits(tmp_path: Path, whole: bytes, digits: list[int]) -> None:
    """Damage that leaves a profile what it was, except for its numbers."""
    following = iter(digits * len(whole))
    changed = bytes(
        ord("0") + next(following) if chr(byte).isdigit() and next(following) < 2 else byte for byte in whole
    )
    check(tmp_path / "digits.json", changed)


@fuzz
@given(st.binary(max_size=80))
@example(b"")
@example(b"\0" * 100)
@example(b'{"provenance":' + b"[" * 20_000)
@example(b'{"model":' * 20_000)
@example(b"[" * 100_000)
@example(b'{"version": 1, "model": {"num_layers": 30, "name": "\xff"}}')
@example(b'{"version": 1, "model": {"num_layers": 30}, "provenance": {"\xff": "\xc3"}}')
@example(b'{"version": 1, "model": {"num_layers": 30}, "\xff": 1}')
@example(b'{"version": 1, "model": {"num_layers": 30}, "' + b"x" * 100_000 + b'": 1}')
@example(b'{"version": 1, "model": {"num_layers": 30}, "\\n\\u001b[31m": 1}')
@example(b'{"version": 1, "model": {"num_layers": 31, "name": "' + b"x" * 100_000 + b'"}}')
@example(b'{"version": 1, "model": {"num_layers": 1' + b"0" * 4_000 + b"}}")
@example(b'{"version": 1, "model": {"num_layers": 1' + b"0" * 400_000 + b"}}")
@example(b'{"version": 1, "model": {"num_layers": 30}, "steps": [{"score_layers": [' + b"1," * 100_000 + b"1]}]}")
@example(b'{"version": 1, "model": {"num_layers": 30}, "steps": [' + b"{}," * 100_000 + b"{}]}")
@example(b'{"version": 1, "model": {"num_layers": 30}, "steps": [{"keep_rate": NaN}]}')
@example(b'{"version": 1, "model": {"num_layers": 30}, "steps": [{"keep_rate": 1e400}]}')
@example(WHOLE["least"] + WHOLE["least"])
@example(WHOLE["least"] + b"\0")
@example(b"\xef\xbb\xbf" + WHOLE["least"])
@example(WHOLE["least"].decode().encode("utf-16"))
def test_garbage(tmp_path: Path, content: bytes) -> None:
    assert check(tmp_path / "garbage.json", content) is None


# --- JSON

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.integers()
    | st.floats()
    | st.floats(0, 1)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, to: tuple = ()) -> list[tuple]:
    """Where in a JSON value another could stand: the keys and indices that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [to] + [place for key, inner in items for place in places(inner, (*to, key))]


@fuzz
@given(data=st.data(), whole=st.sampled_from(list(WHOLE.values())))
def test_another_value_in_one_place(tmp_path: Path, data: st.DataObject, whole: bytes) -> None:
    root = {"profile": json.loads(whole)}
    *way, last = data.draw(st.sampled_from(places(root)[1:]))
    holder: Any = root
    for key in way:
        holder = holder[key]
    new = data.draw(JSON | st.just(...))
    if new is not ...:
        holder[last] = new
    elif isinstance(holder, dict) and last != "profile":
        del holder[last]
    check(tmp_path / "changed.json", json.dumps(root["profile"]).encode())


@st.composite
def profiles(draw: st.DrawFn) -> dict[str, Any]:
    """A valid profile of LAYERS layers, every value of it optional as in a file."""
    prunes = sorted(draw(st.lists(st.integers(0, LAYERS - 2), max_size=4, unique=True)))
    # A step that keeps everything may not come before another one.
    rate = st.floats(0, 1, exclude_min=True, exclude_max=len(prunes) > 1)
    rates = draw(st.lists(rate, min_size=len(prunes), max_size=len(prunes), unique=True))
    steps, lowest = [], 0
    for prune, rate in zip(prunes, sorted(rates, reverse=True), strict=True):
        scored = draw(st.lists(st.integers(lowest, prune), min_size=1, max_size=5, unique=True))
        steps.append({"prune_layer": prune, "keep_rate": rate, "score_layers": sorted(scored)})
        lowest = prune + 1
    optional = {
        "steps": st.just(steps),
        "window": st.integers(1, 1024),
        "pool_kernel": st.integers(0, 511).map(lambda n: 2 * n + 1),
        "ranker": st.sampled_from(["claa", "claa:paper", "claa:carry=0.5,kernel=3", "last-query", "uniform"]),
        "min_prompt_tokens": st.integers(0, 2**31 - 1),
        "provenance": st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))),
    }
    return draw(
        st.fixed_dictionaries({"version": st.just(1), "model": st.just({"num_layers": LAYERS})}, optional=optional)
    )


@fuzz
@given(profile=profiles(), ascii_only=st.booleans())
def test_a_valid_profile_is_used(tmp_path: Path, profile: dict[str, Any], ascii_only: bool) -> None:
    assert check(tmp_path / "valid.json", json.dumps(profile, ensure_ascii=ascii_only, indent=1).encode())


@fuzz
@given(profile=profiles(), keep_rate=st.floats(0, 1, exclude_min=True))
@example({**PROFILE, "steps": [TWO_STEPS[0], {**TWO_STEPS[1], "keep_rate": 5e-324}]}, 0.2)
@example({**PROFILE, "steps": [{**TWO_STEPS[0], "keep_rate": 1e-320}, {**TWO_STEPS[1], "keep_rate": 5e-324}]}, 1.0)
def test_an_explicit_keep_rate_over_any_profile(tmp_path: Path, profile: dict[str, Any], keep_rate: float) -> None:
    file = tmp_path / "rated.json"
    file.write_text(json.dumps(profile))
    assert refused(str(file), keep_rate=keep_rate) is None


@fuzz
@given(profile=profiles(), num_layers=st.integers(2, 200).filter(lambda n: n != LAYERS))
def test_a_profile_of_another_model_is_refused(tmp_path: Path, profile: dict[str, Any], num_layers: int) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps(profile))
    says = refused(str(file), num_layers)
    assert says and f"made for a model of {LAYERS} layers, this model has {num_layers}" in says


def test_the_last_of_two_equal_keys_counts_if_each_could(tmp_path: Path) -> None:
    config = check(tmp_path / "twice.json", b'{"version": 1, "model": {"num_layers": 30}, "window": 9, "window": 10}')
    assert config and config.window == 10
    assert not check(tmp_path / "twice.json", b'{"version": 2, "version": 1, "model": {"num_layers": 30}}')


# --- files


def no_permission(path: Path) -> Path:
    path.write_bytes(WHOLE["least"])
    path.chmod(0)
    # Nothing is forbidden to root, but memory at 0 cannot be read by anybody.
    return path if not os.access(path, os.R_OK) else Path("/proc/self/mem")


def listening(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    return path


def made(make: Callable[[Path], Any]) -> Callable[[Path], Path]:
    return lambda path: (make(path), path)[1]


def not_utf8(path: Path) -> Path:
    (renamed := Path(os.fsdecode(os.fsencode(path) + b"\xff"))).write_bytes(WHOLE["least"])
    return renamed


TOO_LARGE = b'{"version": 1, "model": {"num_layers": 30, "name": "' + b"x" * 10_000_000 + b'"}}'
FILES: dict[str, Callable[[Path], Path]] = {
    "missing": lambda path: path,
    "below a file": lambda path: SHIPPED / "profile.json",
    "a directory": made(Path.mkdir),
    "a link to itself": made(lambda path: path.symlink_to(path)),
    "unreadable": no_permission,
    "a pipe that nobody writes": made(os.mkfifo),
    "a socket": listening,
    "a device without end": lambda path: Path("/dev/zero"),
    "a name too long": lambda path: path / ("x" * 300),
    "a name with a null": lambda path: path / "\0",
    "a name that is no text": not_utf8,
    "10 MB": made(lambda path: path.write_bytes(TOO_LARGE)),
    "1 GB of nothing": made(lambda path: (path.touch(), os.truncate(path, 2**30))),
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_what_cannot_be_read(make: Callable[[Path], Path], tmp_path: Path) -> None:
    says = refused(str(make(tmp_path / "profile")))
    assert says and "cannot be read" in says


def test_the_largest_file_that_is_read(tmp_path: Path) -> None:
    content = WHOLE["shipped"].ljust(MAX_PROFILE_BYTES)
    assert check(tmp_path / "large.json", content)
    assert not check(tmp_path / "large.json", content + b" ")
