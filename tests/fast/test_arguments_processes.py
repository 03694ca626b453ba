"""Arguments across processes: a child unpickles the record, and who never asked for CLAA has SGLang's own."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from claa_sglang.patches.arguments import ARGUMENT_HOOKS, refuse_attributes
from claa_sglang.start.server_config import config_of, is_server_process
from claa_sglang.start.stopping import StartupError
from tests.fast.argument_records import arguments, python


def test_a_child_unpickles_the_record_without_the_plugin(model: str, tmp_path: Path) -> None:
    """SGLANG_PLUGINS keeps the plugin out of the child; the record's own class still brings CLAA along."""
    server_args = arguments(model, enable_claa=True, claa_keep_rate=0.3)
    server_args._claa_server_pid = os.getpid()
    config = config_of(server_args)
    (tmp_path / "record").write_bytes(pickle.dumps(server_args))
    printed = python(
        f"""
import json, pickle, sys
record = pickle.load(open({str(tmp_path / "record")!r}, "rb"))
imported = sorted(name for name in sys.modules if name.startswith(("claa_sglang.patches.", "claa_sglang.plugin")))
from claa_sglang.start.server_config import config_of, is_server_process
from sglang.srt.plugins import load_plugins
load_plugins()
print(json.dumps([type(record).__name__, config_of(record).to_dict(), is_server_process(record), imported]))
""",
        SGLANG_PLUGINS="none",
    )
    assert json.loads(printed) == ["ClaaServerArgs", config.to_dict(), False, ["claa_sglang.patches.hooks"]]
    assert is_server_process(server_args)


LOAD = "from sglang.srt.plugins import load_plugins; load_plugins()"
IMPORT_ORDERS = {
    "flags-first": f"{LOAD}; import sglang.srt.entrypoints.engine",
    "engine-first": f"import sglang.srt.entrypoints.engine; {LOAD}",
}
PARSE_AND_REPORT = """
import json
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs, prepare_server_args
load_plugins()  # as every engine does
found = []
for flags in (["--enable-claa", "--claa-window", "4"], ["--claa-window", "4"], []):
    args = prepare_server_args(["--model-path", "x", *flags])
    given = {flag[2:].replace("-", "_"): True for flag in flags[:1] if flag == "--enable-claa"}
    engine_args = object.__new__(Engine).server_args_class(model_path="x", claa_window=4 if flags else None, **given)
    found.append([type(args).__name__, type(engine_args).__name__, getattr(args, "claa_window", None)])
print(json.dumps([found, Engine.server_args_class is ServerArgs, sorted(HookRegistry._patched)]))
"""


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_engine_and_command_line_make_our_record_only_where_it_is_asked_for(order: str) -> None:
    printed = python(IMPORT_ORDERS[order] + PARSE_AND_REPORT, SGLANG_PLUGINS="claa")
    found, engine_shows_sglangs_class, patched = json.loads(printed)
    asked, refused_later, stock = found
    assert asked == ["ClaaServerArgs", "ClaaServerArgs", 4] and refused_later == asked
    assert stock == ["ServerArgs", "ServerArgs", None] and engine_shows_sglangs_class
    assert patched == sorted(hook.target for hook in ARGUMENT_HOOKS)


# What SGLang and its users do with arguments, some of them made before plugins load.
AS_WITHOUT = """
import copy, io, json, pickle, sys
import msgspec
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import ServerArgs
import sglang.srt.server_args as module

class Mine(ServerArgs):
    mine: int = 0

before, mine = ServerArgs(model_path="x", tp_size=2), Mine(model_path="x", mine=3)
written = pickle.dumps([before, mine, ServerArgs])
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.configs.model_config import register_model_config_factory
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

class Later(module.ServerArgs):
    later: int = 0

HookRegistry.register("sglang.srt.server_args.ServerArgs.url", lambda url, *_: url + "/hooked", HookType.AFTER)
HookRegistry.apply_hooks()
after, later = module.ServerArgs(model_path="x", tp_size=2), Later(model_path="x", later=4)
parsed = module.prepare_server_args(["--model-path", "x", "--tp-size", "2"])
of_engine = object.__new__(Engine).server_args_class(model_path="x", tp_size=2)
records = [before, mine, after, later, parsed, of_engine]
report = []
for record in records + pickle.loads(written)[:2]:
    record.random_seed = 1
    again = pickle.loads(pickle.dumps(record))
    copies = [again, copy.copy(record), copy.deepcopy(record), msgspec.structs.replace(record)]
    fields = {field.name: getattr(record, field.name) for field in record_fields(module.ServerArgs)}
    report.append([
        [type(one).__qualname__ for one in copies], type(record).__module__, [one.tp_size for one in copies],
        isinstance(record, module.ServerArgs), isinstance(record, ServerArgs), repr(record), sorted(fields),
        repr(module.ServerArgs(**fields)), record.url(), sorted(msgspec.structs.asdict(record)),
        type(record) is ServerArgs,
    ])
report += [issubclass(Mine, module.ServerArgs), ServerArgs is module.ServerArgs,
           Engine.server_args_class is ServerArgs, pickle.loads(pickle.dumps(ServerArgs)) is ServerArgs]
register_model_config_factory(Mine, lambda *given: None)
report.append(pickle.dumps(before).count(b"claa"))
print(json.dumps(report))
"""


def test_arguments_that_never_asked_for_claa_are_as_without_the_plugin() -> None:
    """Made before plugins load and after, subclassed, pickled, copied, and under another plugin's hooks."""
    with_plugin, without = (json.loads(python(AS_WITHOUT, SGLANG_PLUGINS=name)) for name in ("claa", "none"))
    assert with_plugin == without


def test_a_flag_set_on_sglangs_own_record_is_refused() -> None:
    """It would be an attribute that nothing reads; the hook is called as SGLang's registry calls it."""
    record = ServerArgs(model_path="x")
    refuse_attributes(record)
    record.enable_claa = False
    refuse_attributes(record)
    record.enable_claa, record.claa_window = True, 4
    with pytest.raises(StartupError, match=r"ClaaServerArgs\(\.\.\., enable_claa=True, claa_window=4\)"):
        refuse_attributes(record)


@pytest.mark.parametrize("value", ["false", "true", 1])
def test_enable_claa_is_true_or_false(model: str, value: Any) -> None:
    with pytest.raises(StartupError, match=f"enable_claa={value!r}: give True or False"):
        arguments(model, enable_claa=value).resolve_once()
