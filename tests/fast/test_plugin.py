"""What loading the plugin does, and how `--enable-claa` stops a start. Real SGLang, no engine."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry

from claa_sglang import plugin
from claa_sglang.patches import arguments, hooks
from claa_sglang.patches.arguments import ARGUMENT_HOOKS
from claa_sglang.start import versions
from claa_sglang.start.stopping import StartupError, stop

# What an image calls its own build of SGLang.
REBUILT = "0.5.23.post1"
# One interpreter for the whole story, as importing SGLang's scheduler takes most of the time.
STORY = """
import inspect, json, logging, sys
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.srt.managers.scheduler as scheduler
from sglang.srt.entrypoints import engine
from sglang.srt.plugins.hook_registry import HookRegistry
from claa_sglang.start.stopping import StartupError

def start(**given):
    load_plugins()  # as every engine does first
    args = object.__new__(engine.Engine).server_args_class(  # as an engine makes its arguments
        model_path=sys.argv[1], load_format="dummy", skip_tokenizer_init=True, device="cpu",
        attention_backend="torch_native", **given)
    try:
        args.resolve_once()
    except StartupError as error:
        return str(error)
    return args

def patched():
    return sorted(HookRegistry._patched)

report = {"loaded": patched(), "plain": type(start()).__name__, "after plain": patched()}
report["patches"] = sorted(name for name in sys.modules if name.startswith("claa_sglang.patches."))
report["refused"] = start(enable_claa=True, cpu_offload_gb=1, kv_canary="log", claa_keep_rate=2.0)
report["after refused"] = patched()
stock = scheduler.Scheduler.get_init_info
scheduler.Scheduler.get_init_info = lambda self, extra: None
report["mismatch"] = start(enable_claa=True)
scheduler.Scheduler.get_init_info = stock
report["after mismatch"] = patched()
said = logging.Handler()
report["said"] = []
said.emit = lambda record: report["said"].append(record.getMessage())
logging.getLogger("claa_sglang.start.activation").addHandler(said)
sys.path.insert(0, sys.argv[2])  # from here on, SGLang's distribution is called 0.5.23.post1
scheduler.Scheduler.get_init_info = lambda self, extra: None
report["mismatch of another version"] = start(enable_claa=True)
scheduler.Scheduler.get_init_info = stock
report["said of a mismatch"] = list(report["said"])
args = start(enable_claa=True, claa_window=4)
report["active"] = patched()
args.resolve_once()
report["again"] = patched()
report["hooked"] = inspect.unwrap(engine._wait_for_scheduler_ready) is not engine._wait_for_scheduler_ready
report["scheduler untouched here"] = scheduler.Scheduler.get_init_info is stock
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from transformers import LlamaConfig

    model = tmp_path_factory.mktemp("llama")
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    LlamaConfig(**shape, num_attention_heads=4, architectures=["LlamaForCausalLM"]).save_pretrained(model)
    renamed = tmp_path_factory.mktemp("renamed")
    metadata = renamed / f"sglang-{REBUILT}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {REBUILT}\n")
    environ = {**os.environ, "SGLANG_PLUGINS": "claa"}
    command = [sys.executable, "-c", STORY, str(model), str(renamed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"stderr": done.stderr, "model": str(model)}


def test_without_the_flag_only_the_arguments_know_of_it(report: dict[str, Any]) -> None:
    assert set(report["loaded"]) == {hook.target for hook in ARGUMENT_HOOKS}
    assert report["plain"] == "ServerArgs" and report["after plain"] == report["loaded"]
    assert report["patches"] == ["claa_sglang.patches.arguments", "claa_sglang.patches.hooks"]


def test_everything_that_is_wrong_is_said_at_once_and_nothing_is_hooked(report: dict[str, Any]) -> None:
    text = report["refused"]
    for word in ("[weight-offload]", "[kv-canary]", "--claa-keep-rate 2.0", "Remedy:", versions.installed("sglang")):
        assert word in text
    assert report["after refused"] == report["loaded"]


def test_another_sglang_is_refused_with_expected_found_and_remedy(report: dict[str, Any]) -> None:
    text = report["mismatch"]
    for word in (
        "sglang.srt.managers.scheduler.Scheduler.get_init_info",
        "expected: parameters (self)",
        "found:    parameters (self, extra)",
        f"pip install sglang=={hooks.SUPPORTED_SGLANG}",
    ):
        assert word in text
    assert report["after mismatch"] == report["loaded"]


def test_a_sglang_of_another_version_is_refused_by_what_does_not_fit_and_told_what_a_container_needs(
    report: dict[str, Any],
) -> None:
    text = report["mismatch of another version"]
    for word in (
        f"the installed sglang {REBUILT}",
        "found:    parameters (self, extra)",
        "in a container, take an image",
    ):
        assert word in text
    assert report["said of a mismatch"] == []


def test_a_sglang_of_another_version_that_fits_starts_and_says_what_was_checked(report: dict[str, Any]) -> None:
    assert len(report["active"]) > len(report["loaded"])
    said = [text for text in report["said"] if "written for" in text]
    assert len(said) == 1 and f"is called {REBUILT}" in said[0] and f"All {len(hooks.collect())} attributes" in said[0]


@pytest.mark.parametrize("found", [hooks.SUPPORTED_SGLANG, f"{hooks.SUPPORTED_SGLANG}+cu130"])
def test_nothing_is_said_of_the_version_that_the_table_was_written_for(
    found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed", lambda distribution: found)
    assert hooks.other_version(1) is None


def test_with_the_flag_the_rows_of_the_server_are_applied_once(report: dict[str, Any]) -> None:
    expected = {hook.target for hook in hooks.collect() if hook.process in ("server", "all")}
    assert set(report["active"]) == expected | set(report["loaded"])
    assert report["again"] == report["active"]
    assert report["hooked"] and report["scheduler untouched here"]


def test_a_start_without_a_profile_warns_once(report: dict[str, Any]) -> None:
    """Of five starts: not without the flag, not where the start is refused, and once where it is resolved twice."""
    assert report["stderr"].count("by default, not because they suit this model") == 1
    assert "layers 0,1,2,3 rank the prompt tokens and tokens are dropped after layer 3 (of 8" in report["stderr"]
    model = report["model"]
    assert f"claa-sglang calibrate --model {model} --out {Path(model).name}.claa.json" in report["stderr"]


def test_registering_makes_no_flag_when_it_fails_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = {target: list(entries) for target, entries in HookRegistry._hooks.items()}
    monkeypatch.setattr(arguments, "mismatches", lambda: [hooks.Mismatch("target", "one", "another")])
    with caplog.at_level(logging.ERROR), pytest.raises(hooks.HookError):
        plugin.register()
    assert "SGLang will not know --enable-claa" in caplog.text
    assert {target: list(entries) for target, entries in HookRegistry._hooks.items()} == before


@pytest.mark.parametrize(
    ("command", "child", "expected"),
    [
        (None, False, StartupError),  # launch_server(server_args) from Python
        ("Engine(enable_claa=True)", False, StartupError),
        ("--model-path x --enable-claa", False, SystemExit),
        ("Engine(enable_claa=True)", True, SystemExit),
        (None, True, SystemExit),
    ],
)
def test_stop_is_an_exception_for_python_and_a_clean_exit_elsewhere(
    command: str | None, child: bool, expected: type[BaseException]
) -> None:
    record = SimpleNamespace(launch_command=command, _claa_server_pid=os.getpid() + child)
    with pytest.raises(expected, match="claa-sglang: no good"):
        stop(record, "no good")


def test_the_entry_point_is_installed() -> None:
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="sglang.srt.plugins") if e.name == "claa"]
    assert entry.value == "claa_sglang.plugin:register" and entry.load() is plugin.register
    assert Path(plugin.__file__).name == "plugin.py"
