"""The flags: how they are given, what their help says, and what becomes of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sglang.srt.arg_groups.arg_utils import namespace_of, record_fields
from sglang.srt.server_args import ServerArgs

from claa_sglang.arguments import ClaaServerArgs
from claa_sglang.config.config import ConfigError
from claa_sglang.config.flags import HELP, ClaaFlags
from claa_sglang.config.profile_file import Profile
from claa_sglang.config.profile_model import describe
from claa_sglang.start.server_config import config_of, flags_of
from claa_sglang.start.stopping import StartupError
from tests.fast.argument_records import arguments, parse

FLAGS = {
    "--claa-keep-rate": ("share of", "above 0, at most 1", "default 0.2"),
    "--claa-prune-layer": ("layer", "0 to L-2", "an error names", "default L//2 - 1"),
    "--claa-score-layers": ("layers", "none above the prune layer", "default 4"),
    "--claa-schedule": ("prune steps", "layers ascending", "14:0.4,20:0.15"),
    "--claa-window": ("tokens", "1 to 1024", "default 32"),
    "--claa-pool-kernel": ("tokens", "odd, 1 to 1023", "default 7"),
    "--claa-ranker": ("claa, last-query, fastkv, gemfilter, uniform", "zscore=on|off", "claa:paper", "default claa"),
    "--claa-scorer": ("triton, flashinfer", "torch", "auto", "default auto"),
    "--claa-min-prompt-tokens": ("tokens", "0 or more", "default 1024"),
    "--claa-mode": ("prune", "observe", "default prune"),
    "--claa-policy": ("auto", "always", "default auto"),
    "--claa-finish": ("idle", "off", "default idle"),
    "--claa-finish-chunk": ("prompt tokens", "1 or more", "default what takes about 10 ms beside launching"),
    "--claa-decode-dense-layers": ("attend to the whole prompt", "0 or more", "default all up to the prune layer"),
    "--claa-allow-explain": ("score of each prompt token", "default off"),
    "--claa-shadow-rate": ("share of the pruned requests", "0 to 1", "default 0"),
    "--claa-profile": ("JSON file", "an explicit flag wins"),
}


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
        ({"claa_allow_explain": "true"}, "--claa-allow-explain 'true': "),
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
    ("dtype", "kv_heads", "tp_size", "kv", "last"),
    [
        ("bfloat16", 2, 1, "auto", 5),
        ("bfloat16", 1, 1, "auto", 3),
        ("float32", 1, 1, "auto", 5),
        ("bfloat16", 2, 2, "auto", 3),
        ("bfloat16", 2, 1, "fp8_e4m3", 3),
    ],
)
def test_the_last_prune_layer_depends_on_kv_heads_dtypes_and_ranks(
    tmp_path: Path, dtype: str, kv_heads: int, tp_size: int, kv: str, last: int
) -> None:
    from transformers import LlamaConfig

    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(**shape, **heads).save_pretrained(tmp_path)
    for prune_layer in (last, last + 1):
        given = {"dtype": dtype, "tp_size": tp_size, "kv_cache_dtype": kv}
        args = arguments(str(tmp_path), claa_prune_layer=prune_layer, **given)
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
