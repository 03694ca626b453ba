"""Servers for tests: those of `claa_sglang.tools.servers`, always on the CPU engine, and two ways to start more.

    with server(model_path, "--enable-claa", "--chunked-prefill-size", "256") as s:
        answer = s.generate(input_ids=[...], sampling_params={"max_new_tokens": 8, "temperature": 0})

Flags given by the test come last and win over CPU_FLAGS, as its environment does over QUICKER.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from claa_sglang.tools.servers import REQUEST_TIMEOUT, START_TIMEOUT, Server, ServerFailed, cpu_server
from tests import nursery

ROOT = Path(__file__).resolve().parents[1]
# Modules of SGLang with the models that tests serve. A model of another one is refused when its server starts.
MODEL_MODULES = {"gemma", "granite", "llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
__all__ = ["REQUEST_TIMEOUT", "START_TIMEOUT", "Server", "ServerFailed", "second_plugin", "server", "start_failure"]


def quicker() -> dict[str, str]:
    """Environment in which SGLang starts sooner and does the same: none of the knobs is CLAA's business.

    It imports the modules of models that tests serve instead of all, which saves three seconds of a core. /health
    answers at once when the server is up: by default it waits a second to see a token, and every test asks for tokens.
    What CLAA_TEST_QUICKER does is in `tests/children/sitecustomize.py` and `tests/children/prepared_server.py`.
    """
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    models = Path(spec.submodule_search_locations[0], "srt", "models")
    others = sorted({path.stem for path in models.glob("*.py")} - MODEL_MODULES)
    return {
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(others),
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "CLAA_TEST_QUICKER": "1",
    }


QUICKER = quicker()


def server(
    model_path: str | os.PathLike[str], *flags: str, env: Mapping[str, str] | None = None
) -> contextlib.AbstractContextManager[Server]:
    """As `cpu_server`, in QUICKER's environment, forked by a process with most imports made (`tests/nursery.py`)."""
    return cpu_server(model_path, *flags, env={**QUICKER, **(env or {})}, popen=nursery.Popen)


def second_plugin(home: Path, name: str, source: str) -> dict[str, str]:
    """Environment in which SGLang finds one more plugin, loaded after ours.

    home: an empty directory, put on PYTHONPATH with the project's own. name: its module. source: its code, with a
    function `register`.
    """
    (home / f"{name}.py").write_text(source)
    info = home / f"{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nzzz_{name} = {name}:register\n")
    return {"PYTHONPATH": os.pathsep.join([str(home), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def start_failure(model_path: str | os.PathLike[str], *flags: str, env: Mapping[str, str] | None = None) -> str:
    """The log of a server that must refuse to start, as users start it. Raises AssertionError if it starts."""
    try:
        with cpu_server(model_path, *flags, env=env):
            pass
    except ServerFailed as failure:
        return failure.log
    raise AssertionError(f"the server started with {flags}")
