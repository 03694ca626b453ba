"""The flags: how they are given, what their help says, and what becomes of them."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass, namespace_of, record_fields
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

from claa_sglang.arguments import ClaaServerArgs
from claa_sglang.config.config import ConfigError
from claa_sglang.config.flags import HELP, ClaaFlags
from claa_sglang.config.profile_file import Profile
from claa_sglang.config.profile_model import describe
from claa_sglang.patches.arguments import ARGUMENT_HOOKS, add_flags, read_config, refuse_attributes, take_flags
from claa_sglang.start.server_config import config_of, flags_of, is_server_process
from claa_sglang.start.stopping import StartupError
from tests.engine_server import second_plugin

FLAGS = {
    "--claa-keep-rate": ("share of", "above 0, at most 1", "default 0.2"),
    "--claa-prune-layer": ("layer", "0 to L-2", "an error names", "default L//2 - 1"),
    "--claa-score-layers": ("layers", "none above the prune layer", "default 4"),
    "--claa-schedule": ("prune steps", "layers ascending", "14:0.4,20:0.15"),
    "--claa-window": ("tokens", "1 to 1024", "default 32"),
    "--claa-pool-kernel": ("tokens", "odd, 1 to 1023", "default 7"),
    "--claa-ranker": ("claa, last-query, fastkv, gemfilter, uniform", "zscore=on|off", "claa:paper", "default claa"),
    "--claa-min-prompt-tokens": ("tokens", "0 or more", "default 1024"),
    "--claa-policy": ("auto", "always", "default auto"),
    "--claa-profile": ("JSON file", "an explicit flag wins"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 8 layers: its config.json, no weights."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("llama")
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    LlamaConfig(**shape, num_attention_heads=4, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    return str(directory)


def arguments(model: str, **given: Any) -> Any:
    cpu = {"device": "cpu", "attention_backend": "torch_native", "skip_tokenizer_init": True}
    return ClaaServerArgs(model_path=model, load_format="dummy", **{**cpu, **given})


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_cli_args_from_dataclass(parser, ClaaServerArgs)
    return parser.parse_args(["--model-path", "x", *flags])


def python(code: str, *args: str, **env: str) -> str:
    """The last line that a fresh interpreter prints which runs `code` with `args`."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


# --- declaration


def test_it_is_sglangs_record_with_our_fields_last() -> None:
    stock, ours = ([field.name for field in record_fields(cls)] for cls in (ServerArgs, ClaaServerArgs))
    assert ours == [*stock, "enable_claa", *(f"claa_{name}" for name in ClaaFlags.__struct_fields__)]
    assert namespace_of(ClaaServerArgs)["claa_keep_rate"] == "claa"


def test_help_names_unit_range_and_default(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split()).replace("enable- claa", "enable-claa")
    assert "--enable-claa " in text
    for flag, words in FLAGS.items():
        part = text.rsplit(f" {flag} ", 1)[1].split(" --claa-")[0]
        for word in (*words, "Needs --enable-claa"):
            assert word in part, f"{flag}: {word!r} is not in its help: {part[:300]}"
    assert set(FLAGS) == {"--claa-" + name.replace("_", "-") for name in HELP}


def test_flags_are_parsed_and_none_means_not_given() -> None:
    flags = ("--enable-claa", "--claa-keep-rate", "0.3", "--claa-score-layers", "2,3")
    given = ClaaServerArgs.from_cli_args(parse(*flags))
    assert given.enable_claa and flags_of(given) == ClaaFlags(keep_rate=0.3, score_layers="2,3")
    nothing = ClaaServerArgs.from_cli_args(parse())
    assert not nothing.enable_claa and flags_of(nothing) == ClaaFlags()


@pytest.mark.parametrize("flags", [("--claa-keep-rate", "a"), ("--claa-window", "1.5"), ("--claa-keeprate", "0.2")])
def test_what_is_not_a_flag_or_a_number_is_refused_by_the_parser(flags: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        parse("--enable-claa", *flags)


# --- configuration


def test_config_uses_the_depth_of_the_model(model: str) -> None:
    config = config_of(arguments(model, enable_claa=True, claa_keep_rate=0.3))
    assert config.num_layers == 8 and len(config.steps) == 1
    assert config.steps[0].prune_layer == 3 and config.steps[0].keep_rate == 0.3


@pytest.mark.parametrize(
    ("given", "layers"), [([1, 3], (1, 3)), ((3,), (3,)), ([3], (3,)), (2, (2, 3)), ("2", (2, 3)), ("1,3", (1, 3))]
)
def test_score_layers_may_be_a_list_or_a_count_from_python(model: str, given: Any, layers: tuple[int, ...]) -> None:
    assert config_of(arguments(model, claa_score_layers=given)).steps[0].score_layers == layers


@pytest.mark.parametrize("given", ["2:0.5,5:0.2:4", ["2:0.5", "5:0.2:4"]])
def test_a_schedule_gives_several_steps(model: str, given: Any) -> None:
    config = config_of(arguments(model, enable_claa=True, claa_schedule=given))
    assert [(s.prune_layer, s.keep_rate, s.score_layers) for s in config.steps] == [(2, 0.5, (0, 1, 2)), (5, 0.2, (4,))]


def test_config_is_made_once_and_travels_with_the_record(model: str, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"version": 1, "model": {"num_layers": 8}, "steps": [{"keep_rate": 0.5}]}))
    server_args = arguments(model, enable_claa=True, claa_profile=str(profile))
    config = config_of(server_args)
    profile.unlink()
    assert config_of(server_args) is config and config.steps[0].keep_rate == 0.5
    assert config_of(pickle.loads(pickle.dumps(server_args))) == config


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"claa_schedule": 840.4}, r'--claa-schedule 840\.4: arrived as a number.*claa-schedule: "14:0\.4"'),
        ({"claa_schedule": [840.4, "20:0.15"]}, r"--claa-schedule \[840\.4, '20:0\.15'\]: 840\.4: arrived as a number"),
        ({"claa_score_layers": []}, r"--claa-score-layers \[\]: is an empty list"),
        ({"claa_score_layers": ["a"]}, "--claa-score-layers 'a,'"),
        ({"claa_score_layers": {1, 3}}, r"--claa-score-layers \{1, 3\}"),
        ({"claa_score_layers": True}, "--claa-score-layers True"),
        ({"claa_window": [4]}, r"--claa-window \[4\]"),
        ({"claa_prune_layer": "3"}, "--claa-prune-layer '3'"),
        ({"claa_policy": True}, "--claa-policy True"),
        ({"claa_ranker": 3}, "--claa-ranker 3"),
        ({"claa_profile": Path("no.json")}, "--claa-profile no.json: cannot be read"),
    ],
)
def test_values_of_another_kind_are_shown_with_how_to_write_them(model: str, given: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_of(arguments(model, enable_claa=True, **given))


def test_config_errors_come_through(model: str) -> None:
    with pytest.raises(ConfigError, match="--claa-keep-rate"):
        config_of(arguments(model, claa_keep_rate=1.5))


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "tp_size", "last"),
    [("bfloat16", 2, 1, 5), ("bfloat16", 1, 1, 3), ("float32", 1, 1, 5), ("bfloat16", 2, 2, 3)],
)
def test_the_last_prune_layer_depends_on_kv_heads_dtype_and_ranks(
    tmp_path: Path, dtype: str, kv_heads: int, tp_size: int, last: int
) -> None:
    from transformers import LlamaConfig

    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(**shape, **heads).save_pretrained(tmp_path)
    for prune_layer in (last, last + 1):
        args = arguments(str(tmp_path), claa_prune_layer=prune_layer, dtype=dtype, tp_size=tp_size)
        if prune_layer == last:
            assert config_of(args).steps[0].prune_layer == last
        else:
            with pytest.raises(ConfigError, match=f"--claa-prune-layer {prune_layer}: .*Prune after layer {last} or"):
                config_of(args)


def test_sglang_and_transformers_describe_a_model_alike(model: str, tmp_path: Path) -> None:
    """So the server takes the profile that was written offline, and refuses it for another shape of equal depth."""
    from transformers import AutoConfig

    profile = tmp_path / "profile.json"
    offline = describe(AutoConfig.from_pretrained(model).to_dict(), 8, "small")
    assert (offline.architecture, offline.heads, offline.kv_heads) == ("LlamaForCausalLM", 4, 4)
    for made_for in (offline, msgspec.structs.replace(offline, hidden_size=128)):
        profile.write_bytes(msgspec.json.encode(Profile(version=1, model=made_for)))
        server_args = arguments(model, enable_claa=True, claa_profile=str(profile))
        if made_for is offline:
            assert config_of(server_args).profile == str(profile)
        else:
            with pytest.raises(ConfigError, match=r"another model \(small\): 128 hidden size, this model has 64"):
                config_of(server_args)


# --- off


def test_without_the_flag_resolution_is_sglangs_own(model: str) -> None:
    ours = arguments(model)
    ours.resolve_once()
    stock = ServerArgs(
        **{f: getattr(ours, f) for f in ServerArgs.__struct_fields__ if f != "random_seed"}, random_seed=1
    )
    stock.resolve_once()
    different = {k for k, v in stock.resolved_dict().items() if ours.resolved_dict()[k] != v}
    assert different <= {"random_seed"}
    assert not any(name.startswith("_claa") for name in vars(ours))


@pytest.mark.parametrize("name", sorted(HELP))
def test_a_claa_flag_without_enable_claa_is_refused_with_the_remedy(model: str, name: str) -> None:
    value = {"score_layers": "2", "profile": "x.json", "keep_rate": 0.3, "min_prompt_tokens": 0}.get(name, 3)
    flag = "--claa-" + name.replace("_", "-")
    with pytest.raises(StartupError, match=f"{flag} given without --enable-claa: add --enable-claa, or remove {flag}"):
        arguments(model, **{f"claa_{name}": value}).resolve_once()


def test_from_the_command_line_it_is_a_clean_exit(model: str) -> None:
    server_args = arguments(model, claa_window=4)
    msgspec.Struct.__setattr__(server_args, "_launch_command", "--model-path x --claa-window 4")
    with pytest.raises(SystemExit) as stop:
        server_args.resolve_once()
    assert "add --enable-claa" in str(stop.value.code)


# --- processes


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


# --- another plugin that replaces ServerArgs

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


# --- configuration files


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("claa-score-layers: [14]", "14,"),
        ("claa-score-layers: [14, 17]", "14,17,"),
        ("claa-score-layers:\n  - 14\n  - 17", "14,17,"),
        ("claa-score-layers: 14", "14"),
        ("claa-score-layers: 14,", "14,"),
        ("claa-score-layers: 14,17", "14,17"),
        ("claa-schedule: '14:0.4'", "14:0.4"),
        ("claa-schedule: 14:0.4,20:0.15", "14:0.4,20:0.15"),
        ("claa-schedule: ['14:0.4', '20:0.15:18+20']", "14:0.4,20:0.15:18+20"),
        ("claa-keep-rate: 0.3", 0.3),
        ("claa-keep-rate: [0.3]", 0.3),
        ("claa-keep-rate: 3e-1", 0.3),
        ("claa-prune-layer: 14", 14),
        ("claa-window: '4'", 4),
        ("claa-pool-kernel: 5", 5),
        ("claa-ranker: uniform", "uniform"),
        ("claa-min-prompt-tokens: 0", 0),
        ("claa-policy: always", "always"),
        ("claa-profile: p.json", "p.json"),
    ],
)
def test_a_configuration_file_says_what_a_command_line_says(tmp_path: Path, line: str, found: Any) -> None:
    assert getattr(from_yaml(tmp_path, line), line.partition(":")[0].replace("-", "_")) == found


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "claa-schedule: 14:0.4",
            'claa-schedule: 840.4: arrived as a number.*write it in quotes, claa-schedule: "14:0.4"',
        ),
        ("claa-schedule: 14:1", 'claa-schedule: 841: arrived as a number.*claa-schedule: "14:1"'),
        ("claa-schedule: 0.4", 'claa-schedule: 0.4: arrived as a number.*in quotes, claa-schedule: "0:0.4"'),
        ("claa-schedule: 14", 'claa-schedule: 14: arrived as a number.*claa-schedule: "14:0.4"'),
        ("claa-schedule: [14:0.4, 20:0.15]", 'claa-schedule .*840.4.*"14:0.4"'),
        ("claa-score-layers: []", "claa-score-layers .*empty list"),
        ("claa-score-layers:", "claa-score-layers: has no value. Leave the line out"),
        ("claa-score-layers: {a: 1}", "claa-score-layers: arrived as {'a': 1}"),
        ("claa-window: [4, 8]", r"claa-window: arrived as the list \[4, 8\]. Give one value"),
        ("claa-keep-rate: []", r"claa-keep-rate: arrived as the list \[\]"),
        ("claa-ranker: off", "claa-ranker: arrived as False"),
        ("claa-profile: null", "claa-profile: has no value"),
        ("claa-window: 8.5", "invalid int value: '8.5'"),
    ],
)
def test_a_value_that_yaml_read_as_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, line: str, says: str
) -> None:
    with pytest.raises(SystemExit):
        from_yaml(tmp_path, line)
    assert re.search(says, capsys.readouterr().err)


def from_yaml(directory: Path, line: str) -> Any:
    """The record of a configuration file with `line`: SGLang's merger and parser, with our hooks in between."""
    parser = argparse.ArgumentParser()
    add_cli_args_from_dataclass(parser, ServerArgs)
    add_flags(None, parser)
    (file := directory / "config.yaml").write_text(f"model-path: x\nenable-claa: true\n{line}\n")
    merger = ConfigArgumentMerger(parser)
    merger._parse_yaml_config = lambda path: read_config(
        ConfigArgumentMerger._parse_yaml_config(merger, path), merger, path
    )
    given = parser.parse_args(merger.merge_config_with_args(["--config", str(file)]))
    return take_flags(ServerArgs.from_cli_args(given), given)
