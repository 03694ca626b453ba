"""The server that most tests share: starting one costs far more than asking it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.answers")  # before it is imported: failures say what differed

from tests import byte_tokenizer  # noqa: E402
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS  # noqa: E402
from tests.engine_server import Server, server  # noqa: E402
from tests.in_flight import MOMENT_FLAGS  # noqa: E402
from tests.reference_model import Later, ReferenceModel  # noqa: E402
from tests.routes_server import FLAGS  # noqa: E402

# Prefixes stay as they were left, or tests of pruned follow-ups would depend on how long the server was idle.
CLAA_FLAGS = (
    *("--enable-claa", "--claa-policy", "always", "--claa-min-prompt-tokens", "0"),
    *("--claa-finish", "off"),
)
SHARED_CHUNK = 256
# A second prune for the tiny llama; its first one is the default.
SECOND = Later(prune_layer=5, score_layers=(4, 5), power=1.5)
SCHEDULE = ("--claa-schedule", f"3:0.25:0+1+2+3,5:{0.25**SECOND.power}:4+5")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What ends a shared server comes after everything else."""
    items.sort(key=lambda item: item.get_closest_marker("ends_server") is not None)


@pytest.fixture(scope="session")
def model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with a byte tokenizer: for texts, stop strings and grammars."""
    return byte_tokenizer.add(tiny_model("llama"), tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that names what fails in a server with `planted.FILE` in its environment: nothing yet."""
    file = tmp_path_factory.mktemp("fault") / "name"
    file.write_text("")
    return file


@pytest.fixture(scope="session")
def llama_server(tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    """The tiny llama with CLAA at its defaults, except that short prompts are pruned too, and requests may be
    explained; chunks of 256 tokens."""
    chunk = ("--chunked-prefill-size", str(SHARED_CHUNK))
    flags = (*CLAA_FLAGS, "--claa-allow-explain", *TINY_FLAGS, *chunk)
    with server(tiny_model("llama"), *flags, env=STRICT | ONE_THREAD) as running:
        yield running


@pytest.fixture(scope="session")
def off_server(tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    """The tiny llama with the plugin there and not asked for, which `test_dense_is_stock` holds against stock."""
    with server(tiny_model("llama"), *TINY_FLAGS, "--chunked-prefill-size", str(SHARED_CHUNK), env=ONE_THREAD) as off:
        yield off


@pytest.fixture(scope="session")
def moments_server(model: Path) -> Iterator[Server]:
    """The tiny llama with a tokenizer, where requests can be caught: two run at once, in chunks of 32 tokens."""
    with server(model, *CLAA_FLAGS, *MOMENT_FLAGS, env=STRICT | ONE_THREAD) as running:
        yield running


@pytest.fixture(scope="session")
def routes_server(small_model_path: Path) -> Iterator[Server]:
    """SmolLM2 with a tokenizer, asked on every route."""
    with server(small_model_path, *FLAGS, env=ONE_THREAD) as running:
        log = running.log()
        assert "answers can suffer" not in log, "its layers are given as flags"
        yield running
        # SGLang logs exceptions in streams of /v1/responses, and answers.
        assert "Traceback" not in running.log()[len(log) :]


@pytest.fixture(scope="session")
def llama_reference(tiny_model: Callable[[str], Path]) -> ReferenceModel:
    """The reference of the tiny llama, with the settings of `llama_server`."""
    return ReferenceModel(tiny_model("llama"), prune_layer=3, score_layers=(0, 1, 2, 3))


@pytest.fixture(scope="module", params=[1, 2], ids=["one prune", "two prunes"])
def prunes(request: pytest.FixtureRequest) -> int:
    """For modules whose server prunes once, and then twice."""
    return request.param


@pytest.fixture(scope="module")
def reference(prunes: int, tiny_model: Callable[[str], Path]) -> ReferenceModel:
    """The reference of the tiny llama, pruned as often as the module's server does."""
    later = (SECOND,)[: prunes - 1]
    return ReferenceModel(tiny_model("llama"), prune_layer=3, score_layers=(0, 1, 2, 3), later=later)
