"""The examples, each run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tiny_model import build_with_tokenizer
from claa_sglang.tools.cpu_env import cpu_environment
from tests.conftest import ROOT
from tests.engine_server import QUICKER, Server
from tests.routes_server import KEEP_RATE

pytestmark = pytest.mark.engine


def run(name: str, *words: str, **env: str) -> str:
    """What it prints."""
    command = [sys.executable, str(ROOT / "examples" / name), *words]
    environ = {**os.environ, **cpu_environment(), **QUICKER, **env}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return done.stdout


def test_openai_client(routes_server: Server) -> None:
    said = run("openai_client.py", routes_server.url)
    kept, tokens = map(int, re.findall(r"kept (\d+) of (\d+) prompt tokens", said)[0])
    assert kept == int(KEEP_RATE * tokens) and tokens > 1000
    assert re.search(r"dense, streamed: .+\ndisabled by request\n$", said, re.DOTALL)


def test_tools(routes_server: Server) -> None:
    said = run("tools.py", routes_server.url)
    reasoning, call, kept = said.strip().splitlines()
    assert reasoning == "reasoning: None" and re.fullmatch(r'book_ferry\(\{"hour": \d+\}\)', call)
    assert re.fullmatch(r"kept (\d+) of (\d+) prompt tokens", kept)


def test_frontend(routes_server: Server) -> None:
    lines = run("frontend.py", routes_server.url).strip().splitlines()
    assert len(lines) == 3 and all(re.fullmatch(r".+\? ['\"].+['\"]", line) for line in lines)


def test_rag(routes_server: Server) -> None:
    rows = [line.split() for line in run("rag.py", routes_server.url).strip().splitlines()[1:]]
    prompt, cached, kept = ([int(row[column]) for row in rows] for column in (1, 2, 3))
    assert kept == [int(KEEP_RATE * tokens) for tokens in prompt]
    # The third question is over the first document.
    assert cached[2] > 0.9 * prompt[2] > 100 > max(cached[1], 0)


def test_offline_batch(small_model_path: Path, tmp_path: Path) -> None:
    said = run("offline_batch.py", str(build_with_tokenizer(tmp_path, small_model_path)))
    pairs = [tuple(map(int, pair)) for pair in re.findall(r"kept (\d+) of (\d+): ", said)]
    assert len(pairs) == 2 and all(0 < kept < tokens / 2 for kept, tokens in pairs)


def test_launch_stops_where_the_doctor_says_no(small_model_path: Path) -> None:
    """With flags that would start, what comes next is the launch command of every other test."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(ROOT / "examples" / "launch.sh"), str(small_model_path), "--claa-keep-rate", "7"]
    environ = {**os.environ, **cpu_environment(), "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300)
    assert done.returncode == 1 and "--claa-keep-rate 7" in done.stdout, done.stdout + done.stderr
    assert "Load weight begin" not in done.stderr
