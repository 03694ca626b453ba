"""Servers for tests: those of `claa_sglang.tools.servers`, always on the CPU engine, and two ways to start more.

    with server(model_path, "--enable-claa", "--chunked-prefill-size", "256") as s:
        answer = s.generate(input_ids=[...], sampling_params={"max_new_tokens": 8, "temperature": 0})

Flags given by the test come last and win over CPU_FLAGS.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from claa_sglang.tools.servers import REQUEST_TIMEOUT, START_TIMEOUT, Server, ServerFailed
from claa_sglang.tools.servers import cpu_server as server

ROOT = Path(__file__).resolve().parents[1]
__all__ = ["REQUEST_TIMEOUT", "START_TIMEOUT", "Server", "ServerFailed", "second_plugin", "server", "start_failure"]


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
    """The log of a server that must refuse to start. Raises AssertionError if it starts."""
    try:
        with server(model_path, *flags, env=env):
            pass
    except ServerFailed as failure:
        return failure.log
    raise AssertionError(f"the server started with {flags}")
