"""Arguments beside another plugin that replaces SGLang's record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine_server import second_plugin
from tests.fast.argument_records import python

OTHER_PLUGIN = """
import os, sys
from sglang.srt.arg_groups.arg_utils import A, Arg
from sglang.srt.server_args import ServerArgs

class OtherServerArgs(ServerArgs):
    other_flag: A[int, Arg(help="Another plugin's flag.")] = 1

    def __init_subclass__(cls, **kwargs):
        if os.environ.get("OTHER_IS_FINAL"):
            raise TypeError("OtherServerArgs is final")
        super().__init_subclass__(**kwargs)

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    if os.environ.get("OTHER_ASSIGNS"):
        import sglang.srt.server_args
        sglang.srt.server_args.ServerArgs = OtherServerArgs
    else:
        HookRegistry.register("sglang.srt.server_args.ServerArgs", OtherServerArgs, HookType.REPLACE)
    if os.environ.get("OTHER_ENGINE"):
        target = "sglang.srt.entrypoints.engine.Engine.server_args_class"
        HookRegistry.register(target, OtherServerArgs, HookType.REPLACE)
"""
BOTH = """
import json, pickle, sys
import sglang.srt.entrypoints.engine as engine
from importlib.metadata import entry_points
home, order, written = sys.argv[1:]
sys.path.insert(0, home) if order == "other first" else sys.path.append(home)
import sglang.srt.server_args as module
from sglang.srt.plugins import load_plugins
load_plugins()
both = module.prepare_server_args(["--model-path", "x", "--enable-claa", "--other-flag", "3", "--claa-window", "4"])
made = object.__new__(engine.Engine).server_args_class(model_path="x", enable_claa=True, claa_window=4, other_flag=3)
theirs = module.prepare_server_args(["--model-path", "x", "--other-flag", "3"])
open(written, "wb").write(pickle.dumps([both, made, theirs]))
kinds = [[cls.__name__ for cls in type(record).__mro__[:3]] for record in (both, made, theirs)]
values = [[getattr(record, name, None) for name in ("enable_claa", "claa_window", "other_flag")]
          for record in (both, made, theirs)]
order = [entry.name for entry in entry_points(group="sglang.srt.plugins")]
print(json.dumps([order, kinds, values, both.launch_command]))
"""
UNPICKLE = """
import json, pickle, sys
sys.path.append(sys.argv[1])
records = pickle.load(open(sys.argv[2], "rb"))
print(json.dumps([[type(r).__name__, getattr(r, "claa_window", None), r.other_flag] for r in records]))
"""


@pytest.fixture(scope="module")
def other_plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a plugin that replaces ServerArgs by a subclass with a flag of its own."""
    home = tmp_path_factory.mktemp("other")
    second_plugin(home, "claa_test_other", OTHER_PLUGIN)
    return str(home)


@pytest.mark.parametrize(
    ("order", "env"),
    [
        ("other first", {}),
        ("other last", {}),
        ("other last", {"OTHER_ENGINE": "1"}),
        ("other first", {"OTHER_ASSIGNS": "1"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_another_plugin_that_replaces_server_args_stacks(
    order: str, env: dict[str, str], other_plugin: str, tmp_path: Path
) -> None:
    names = "claa,zzz_claa_test_other"
    written = str(tmp_path / "records")
    loaded, kinds, values, command = json.loads(python(BOTH, other_plugin, order, written, SGLANG_PLUGINS=names, **env))
    two = [name for name in loaded if "claa" in name]
    assert two == sorted(two, reverse=order == "other first") and len(two) == 2
    claa = ["ClaaOtherServerArgs", "OtherServerArgs", "ServerArgs"]
    assert kinds == [claa, claa, ["OtherServerArgs", "ServerArgs", "Struct"]]
    assert values == [[True, 4, 3], [True, 4, 3], [None, None, 3]] and "--other-flag 3" in command
    if not env:  # a child unpickles before it loads plugins
        found = json.loads(python(UNPICKLE, other_plugin, written, SGLANG_PLUGINS="none"))
        assert found == [["ClaaOtherServerArgs", 4, 3]] * 2 + [["OtherServerArgs", None, 3]]


def test_a_class_that_cannot_be_extended_is_named_with_its_plugin(other_plugin: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BOTH, other_plugin, "other last", str(tmp_path / "records")]
    env = {**os.environ, "SGLANG_PLUGINS": "claa,zzz_claa_test_other", "OTHER_IS_FINAL": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "claa_test_other.OtherServerArgs" in said and "SGLANG_PLUGINS=claa" in said
    assert "plugin=zzz_claa_test_other" in said and "OtherServerArgs is final" in said
