"""A profile gives what flags do not, or is refused by file and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import claa_sglang
from claa_sglang.config.config import ConfigError, PruneStep
from claa_sglang.config.flags import ClaaFlags, resolve
from claa_sglang.config.profile_file import load_profile
from claa_sglang.config.profile_model import describe


def test_a_profile_gives_every_value(write) -> None:
    path = write()
    config = resolve(ClaaFlags(profile=path), 30)
    assert config.steps == (PruneStep(prune_layer=19, keep_rate=0.3, score_layers=(17, 18)),)
    assert (config.window, config.pool_kernel, config.min_prompt_tokens) == (16, 13, 256)
    assert config.ranker == "claa:paper"
    assert config.profile == path


def test_an_explicit_flag_wins_over_the_profile(write) -> None:
    path = write()
    flags = ClaaFlags(profile=path, keep_rate=0.5, prune_layer=21, score_layers="2", window=8, pool_kernel=7)
    config = resolve(flags, 30)
    assert config.steps == (PruneStep(prune_layer=21, keep_rate=0.5, score_layers=(20, 21)),)
    assert (config.window, config.pool_kernel, config.min_prompt_tokens) == (8, 7, 256)
    assert resolve(ClaaFlags(profile=write(), min_prompt_tokens=0), 30).min_prompt_tokens == 0
    assert resolve(ClaaFlags(profile=write(), ranker="claa"), 30).ranker == "claa"
    kept = resolve(ClaaFlags(profile=write(), prune_layer=18), 30).steps[0]
    assert kept == PruneStep(prune_layer=18, keep_rate=0.3, score_layers=(17, 18))


def test_a_profile_that_names_no_ranker_runs_what_its_calibration_measured(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"version": 1, "model": {"num_layers": 30}, "provenance": {"made by": "claa-sglang calibrate"}}')
    assert resolve(ClaaFlags(profile=str(path)), 30).ranker == "claa:paper"
    assert resolve(ClaaFlags(profile=str(path), ranker="claa"), 30).ranker == "claa"
    path.write_text('{"version": 1, "model": {"num_layers": 30}}')  # by hand: the default
    assert resolve(ClaaFlags(profile=str(path)), 30).ranker == "claa"


def test_a_profile_may_leave_values_out(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"version": 1, "model": {"num_layers": 30}}')
    assert resolve(ClaaFlags(profile=str(path)), 30).steps == resolve(ClaaFlags(), 30).steps
    path.write_text('{"version": 1, "model": {"num_layers": 30}, "steps": [{"prune_layer": 19}]}')
    assert resolve(ClaaFlags(profile=str(path)), 30).steps[0].score_layers == (16, 17, 18, 19)


def test_an_explicit_prune_layer_below_the_profiles_scored_layers(write) -> None:
    path = write()
    with pytest.raises(ConfigError, match="--claa-score-layers 17,18: must be layers 0 to 14") as caught:
        resolve(ClaaFlags(profile=path, prune_layer=14), 30)
    assert f"--claa-profile {path}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 2}, "version"),
        ({"keep_rate": 0.2}, "unknown field `keep_rate`"),
        ({"model": {"num_layers": 30, "layers": 30}}, r"unknown field `layers`.*model"),
        ({"steps": [{"prune_layer": 19, "keeprate": 0.2}]}, "unknown field `keeprate`"),
        ({"steps": [{"prune_layer": 19, "keep_rate": 1.5}]}, "keep_rate"),
        ({"steps": [{"prune_layer": 19, "keep_rate": True}]}, "keep_rate"),
        ({"steps": [{"prune_layer": "19"}]}, "prune_layer"),
        ({"steps": [{"prune_layer": 19, "score_layers": []}]}, "score_layers"),
        ({"window": 0}, "window"),
        ({"pool_kernel": None}, "pool_kernel"),
        ({"provenance": {"nested": {}}}, "provenance"),
        ({"model": {}}, "num_layers"),
        ({"model": {"num_layers": 32, "name": "other"}}, r"32 layers \(other\), this model has 30"),
        ({"steps": [{"prune_layer": 29}]}, "--claa-prune-layer 29: must be 0 to 28"),
        ({"steps": [{"prune_layer": 19, "score_layers": [18, 17]}]}, "must ascend"),
        ({"pool_kernel": 4}, "must be odd"),
        ({"ranker": 7}, "ranker"),
        ({"ranker": "claa:carry=11"}, "--claa-ranker: .*carry='11' must be a number from 0 to 10"),
    ],
)  # fmt: skip
def test_a_bad_profile_is_refused_by_file_and_field(changes: dict, text: str, write) -> None:
    path = write(**changes)
    with pytest.raises(ConfigError, match=text) as caught:
        resolve(ClaaFlags(profile=path), 30)
    assert path in str(caught.value)


CONFIG_JSON = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "LlamaForCausalLM, this model is Qwen2ForCausalLM"),
        ({"architectures": None}, "this model is of no named architecture"),
        ({"hidden_size": 4096}, "576 hidden size, this model has 4,096"),
        ({"num_attention_heads": 12}, "9 attention heads, this model has 12"),
        ({"num_key_value_heads": None}, "3 KV heads, this model has 9"),
        ({"vocab_size": 32000}, "49,152 tokens of vocabulary, this model has 32,000"),
        ({"vocab_size": None}, "49,152 tokens of vocabulary, this model has none"),
    ],
)
def test_a_profile_of_another_architecture_is_refused_by_what_differs(changes: dict, says: str, write) -> None:
    path = write()
    assert load_profile(path, 30, describe(CONFIG_JSON, 30)) == load_profile(path, 30)
    with pytest.raises(ConfigError) as caught:
        load_profile(path, 30, describe({**CONFIG_JSON, **changes}, 30))
    text = str(caught.value)
    assert f"--claa-profile {path}: made for another model (small): " in text and says in text
    assert "Use the profile of this model, or none. `claa-sglang calibrate` makes one." in text


def test_only_what_a_profile_states_is_compared(write) -> None:
    other = describe({"text_config": {**CONFIG_JSON, "hidden_size": 64}, "architectures": ["Other"]}, 30)
    load_profile(write(model={"num_layers": 30, "name": "by hand", "heads": 9}), 30, other)
    with pytest.raises(ConfigError, match="LlamaForCausalLM, this model is Other; 576 hidden size, this model has 64"):
        load_profile(write(), 30, other)


def test_shipped_profiles_load() -> None:
    for path in sorted((Path(claa_sglang.__file__).parent / "profiles").glob("*.json")):
        num_layers = json.loads(path.read_text())["model"]["num_layers"]
        config = resolve(ClaaFlags(profile=str(path)), num_layers)
        assert len(config.steps) == len(load_profile(str(path), num_layers).steps), f"{path.name} has no steps"
