"""Flags and profiles become one consistent configuration, or a refusal that names the flag and the remedy."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import claa_sglang
from claa_sglang.config.config import ClaaConfig, ConfigError, PruneStep
from claa_sglang.config.flags import HELP, ClaaFlags, resolve
from claa_sglang.config.profile_file import load_profile
from claa_sglang.config.profile_model import describe
from tests.fast.consistent import assert_consistent

PROFILE = {
    "version": 1,
    "model": {
        "num_layers": 30,
        "name": "small",
        "architecture": "LlamaForCausalLM",
        "hidden_size": 576,
        "heads": 9,
        "kv_heads": 3,
        "vocabulary": 49152,
    },
    "steps": [{"prune_layer": 19, "keep_rate": 0.3, "score_layers": [17, 18]}],
    "window": 16,
    "pool_kernel": 13,
    "ranker": "claa:paper",
    "min_prompt_tokens": 256,
    "provenance": {"text": "prose", "date": "2025-11-01"},
}
TWO_STEPS = [
    {"prune_layer": 14, "keep_rate": 0.4, "score_layers": [14]},
    {"prune_layer": 20, "keep_rate": 0.1, "score_layers": [18, 20]},
]


@pytest.fixture
def write(tmp_path: Path):
    def write_profile(**changes: object) -> str:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({**PROFILE, **changes}))
        return str(path)

    return write_profile


@pytest.mark.parametrize(
    ("num_layers", "prune_layer", "score_layers"),
    [(2, 0, (0,)), (3, 0, (0,)), (6, 2, (0, 1, 2)), (8, 3, (0, 1, 2, 3)), (30, 14, (11, 12, 13, 14)),
     (32, 15, (12, 13, 14, 15))],
)  # fmt: skip
def test_defaults(num_layers: int, prune_layer: int, score_layers: tuple[int, ...]) -> None:
    config = resolve(ClaaFlags(), num_layers)
    step = PruneStep(prune_layer=prune_layer, keep_rate=0.2, score_layers=score_layers)
    assert config == ClaaConfig(
        steps=(step,),
        num_layers=num_layers,
        window=32,
        pool_kernel=7,
        min_prompt_tokens=1024,
        policy="auto",
        ranker="claa",
        profile=None,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4", (11, 12, 13, 14)), ("1", (14,)), ("15", tuple(range(15))), ("8,12,14", (8, 12, 14)),
     ("14,", (14,)), (" 0 , 3 ", (0, 3)), ("6,", (6,))],
)  # fmt: skip
def test_score_layers_are_a_count_or_a_list(text: str, expected: tuple[int, ...]) -> None:
    assert resolve(ClaaFlags(score_layers=text), 30).steps[0].score_layers == expected


def test_every_flag_is_used() -> None:
    flags = ClaaFlags(keep_rate=1, prune_layer=28, score_layers="8,12", window=1, pool_kernel=1, min_prompt_tokens=0)
    config = resolve(flags, 30)
    assert config.steps == (PruneStep(prune_layer=28, keep_rate=1.0, score_layers=(8, 12)),)
    assert (config.window, config.pool_kernel, config.min_prompt_tokens) == (1, 1, 0)
    assert set(HELP) == set(ClaaFlags.__struct_fields__)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"keep_rate": 0.0}, r"--claa-keep-rate 0\.0: .*above 0, at most 1"),
        ({"keep_rate": 1.01}, r"--claa-keep-rate 1\.01"),
        ({"keep_rate": math.nan}, "--claa-keep-rate nan"),
        ({"keep_rate": math.inf}, "--claa-keep-rate inf"),
        ({"keep_rate": True}, "--claa-keep-rate True"),
        ({"keep_rate": "0.2"}, "--claa-keep-rate '0.2'"),
        ({"prune_layer": -1}, "--claa-prune-layer -1: .*0 to L-2"),
        ({"prune_layer": 29}, r"--claa-prune-layer 29: must be 0 to 28.*default 14"),
        ({"prune_layer": 3.0}, "--claa-prune-layer 3.0"),
        ({"score_layers": "0"}, "--claa-score-layers 0: a count must be 1 to 15.*alone is written 0,"),
        ({"score_layers": "16"}, "--claa-score-layers 16: a count must be 1 to 15"),
        ({"score_layers": "15,"}, "--claa-score-layers 15,: must be layers 0 to 14.*--claa-prune-layer"),
        ({"score_layers": "8,12,14,17"}, "must be layers 0 to 14"),
        ({"score_layers": "12,8"}, "must ascend, each layer once; write 8,12"),
        ({"score_layers": "8,8"}, "must ascend, each layer once; write 8,"),
        ({"score_layers": ""}, "--claa-score-layers '': .*such as 14,"),
        ({"score_layers": ","}, "--claa-score-layers ','"),
        ({"score_layers": "8,,12"}, "--claa-score-layers '8,,12'"),
        ({"score_layers": "-1,4"}, "--claa-score-layers '-1,4'"),
        ({"score_layers": "last four"}, "--claa-score-layers 'last four'"),
        ({"score_layers": "²"}, "--claa-score-layers"),
        ({"score_layers": 4}, "--claa-score-layers 4"),
        ({"schedule": "840.4"}, '--claa-schedule 840.4: arrived as a number.*claa-schedule: "14:0.4"'),
        ({"schedule": 14}, "--claa-schedule.*14.*ive the prune steps"),
        ({"schedule": math.nan}, "--claa-schedule nan: give the prune steps"),
        ({"window": 0}, "--claa-window 0: .*1 to 1024"),
        ({"window": 1025}, "--claa-window 1025"),
        ({"pool_kernel": 4}, "--claa-pool-kernel 4: must be odd"),
        ({"pool_kernel": -1}, "--claa-pool-kernel -1: .*odd, 1 to 1023"),
        ({"min_prompt_tokens": -1}, "--claa-min-prompt-tokens -1"),
        ({"window": "\udcff"}, "--claa-window"),
        ({"score_layers": "\udcff"}, "--claa-score-layers"),
        ({"profile": "\udcff"}, "--claa-profile"),
        ({"profile": "no/such/file.json"}, "--claa-profile no/such/file.json: cannot be read"),
        ({"profile": "nul\0"}, "--claa-profile"),
        ({"profile": "."}, "--claa-profile .: cannot be read"),
    ],
)
def test_refusals_name_the_flag(flags: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        resolve(ClaaFlags(**flags), 30)


def test_a_model_without_late_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="--enable-claa.*no late layers"):
        resolve(ClaaFlags(), 1)


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


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prune_layer": 14, "score_layers": [14]}, "above the previous step's prune layer 14"),
        ({"score_layers": [14, 20]}, "above the previous step's prune layer 14"),
        ({"keep_rate": 0.4}, "keep_rate 0.4 must be below the previous step's 0.4"),
        ({"keep_rate": 0.6}, "keep_rate 0.6 must be below"),
        ({"keep_rate": 1.0}, "keep_rate 1.0 must be below"),
    ],
)
def test_steps_must_go_up_in_layers_and_down_in_rate(changes: dict, text: str, write) -> None:
    assert len(resolve(ClaaFlags(profile=write(steps=TWO_STEPS)), 30).steps) == 2
    with pytest.raises(ConfigError, match=text):
        resolve(ClaaFlags(profile=write(steps=[TWO_STEPS[0], {**TWO_STEPS[1], **changes}])), 30)


def test_a_step_that_drops_nothing_before_one_that_does(write) -> None:
    with pytest.raises(ConfigError, match=r"layer 14: keep_rate 1 drops nothing.*Leave out the step at layer 14"):
        resolve(ClaaFlags(profile=write(steps=[{**TWO_STEPS[0], "keep_rate": 1.0}, TWO_STEPS[1]])), 30)


def test_a_later_step_needs_all_its_values(write) -> None:
    with pytest.raises(ConfigError, match="missing required field `keep_rate`"):
        resolve(ClaaFlags(profile=write(steps=[TWO_STEPS[0], {"prune_layer": 20, "score_layers": [20]}])), 30)


def test_an_explicit_keep_rate_scales_the_later_steps(write) -> None:
    config = resolve(ClaaFlags(profile=write(steps=TWO_STEPS), keep_rate=0.2), 30)
    assert [step.keep_rate for step in config.steps] == pytest.approx([0.2, 0.1 ** (math.log(0.2) / math.log(0.4))])
    assert config == resolve(ClaaFlags(profile=config.profile), 30).with_keep_rate(0.2)


def _steps(rates: list[float]) -> ClaaConfig:
    steps = [{"prune_layer": layer, "keep_rate": rate, "score_layers": [layer]} for layer, rate in enumerate(rates)]
    return msgspec.convert({"steps": steps, "num_layers": 30}, ClaaConfig)


@given(
    rates=st.lists(st.floats(1e-6, 0.999999), min_size=1, max_size=4, unique=True),
    rate=st.floats(0, 1, exclude_min=True),
)
@settings(deadline=None)
def test_later_rates_follow_a_requests_keep_rate(rates: list[float], rate: float) -> None:
    config = _steps(sorted(rates, reverse=True))
    changed = config.with_keep_rate(rate)
    got = [step.keep_rate for step in changed.steps]
    assert got[0] == max(rate, 1e-9)
    assert got == sorted(set(got), reverse=True) or got == [1.0] * len(got)
    assert 0 < got[-1]
    power = math.log(got[0]) / math.log(config.steps[0].keep_rate)
    for before, after in zip(config.steps, changed.steps, strict=True):
        assert after.keep_rate == pytest.approx(before.keep_rate**power)
        assert (after.prune_layer, after.score_layers) == (before.prune_layer, before.score_layers)
    assert changed.namespace == config.namespace


# Rates that are not cut off at MIN_RATE: below it, steps no longer fall together.
@given(rates=st.lists(st.floats(0.05, 0.8), min_size=2, max_size=4, unique=True), rate=st.floats(0.05, 1))
@settings(deadline=None)
def test_the_configured_rate_gives_the_configured_steps_and_1_prunes_nowhere(rates: list[float], rate: float) -> None:
    config = _steps(sorted(rates, reverse=True))
    assert config.with_keep_rate(config.steps[0].keep_rate) == config
    assert {step.keep_rate for step in config.with_keep_rate(1).steps} == {1.0}
    # All fall and rise together.
    lower, upper = config.with_keep_rate(rate * 0.9), config.with_keep_rate(rate)
    assert all(a.keep_rate < b.keep_rate for a, b in zip(lower.steps, upper.steps, strict=True))


def test_steps_that_all_keep_everything_fall_as_one() -> None:
    got = [step.keep_rate for step in _steps([1.0, 1.0]).with_keep_rate(0.3).steps]
    assert got == [0.3, math.nextafter(0.3, 0)]


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, math.nan, math.inf])
def test_a_keep_rate_outside_the_range_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        _steps([0.2]).with_keep_rate(rate)


def test_only_the_first_prune_layer_makes_the_namespace(write) -> None:
    base = resolve(ClaaFlags(prune_layer=14), 30)
    others = [
        resolve(ClaaFlags(prune_layer=14, keep_rate=0.4, score_layers="8,", window=4, pool_kernel=3), 30),
        resolve(ClaaFlags(profile=write(steps=TWO_STEPS)), 30),
    ]
    assert base.namespace == "claa:p14" == others[0].namespace == others[1].namespace
    assert resolve(ClaaFlags(prune_layer=15), 30).namespace != base.namespace


def test_the_config_travels(write) -> None:
    config = resolve(ClaaFlags(profile=write(steps=TWO_STEPS)), 30)
    assert pickle.loads(pickle.dumps(config)) == config
    shown = config.to_dict()
    assert json.loads(json.dumps(shown)) == shown
    assert shown["namespace"] == config.namespace and shown["steps"] == TWO_STEPS
    del shown["namespace"]
    assert msgspec.convert(shown, ClaaConfig) == config


@pytest.mark.parametrize("changes", [{"windw": 8}, {"steps": []}, {"num_layers": 1}, {"window": True}])
def test_the_record_itself_is_strict(changes: dict) -> None:
    steps = [{"prune_layer": 0, "keep_rate": 0.2, "score_layers": [0]}]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"steps": steps, "num_layers": 30, **changes}, ClaaConfig)


ANY = st.none() | st.integers(-2, 40) | st.floats() | st.booleans() | st.text(max_size=4)


@given(
    flags=st.builds(
        ClaaFlags,
        keep_rate=ANY | st.floats(0, 1),
        prune_layer=ANY,
        score_layers=st.none() | st.from_regex(r"[0-9, ]{0,6}", fullmatch=True) | ANY,
        schedule=st.none() | st.from_regex(r"([0-9]{1,2}:[01]?\.[0-9]{1,2}[:+,0-9]{0,5}){0,3}", fullmatch=True) | ANY,
        window=ANY,
        pool_kernel=ANY,
        min_prompt_tokens=ANY,
    ),
    num_layers=st.integers(0, 40),
)
@settings(deadline=None)
def test_flags_give_a_consistent_config_or_a_config_error(flags: ClaaFlags, num_layers: int) -> None:
    try:
        config = resolve(flags, num_layers)
    except ConfigError as error:
        assert "--claa-" in str(error) or "--enable-claa" in str(error)
        return
    assert flags.schedule is not None or len(config.steps) == 1
    assert_consistent(config, num_layers)


def test_shipped_profiles_load() -> None:
    for path in sorted((Path(claa_sglang.__file__).parent / "profiles").glob("*.json")):
        num_layers = json.loads(path.read_text())["model"]["num_layers"]
        config = resolve(ClaaFlags(profile=str(path)), num_layers)
        assert len(config.steps) == len(load_profile(str(path), num_layers).steps), f"{path.name} has no steps"


def test_the_ranker_is_checked() -> None:
    assert resolve(ClaaFlags(ranker="fastkv"), 8).ranker == "fastkv"
    with pytest.raises(ConfigError, match="--claa-ranker: .*no such name; give claa, "):
        resolve(ClaaFlags(ranker="snapkv"), 8)


def test_the_policy_is_checked() -> None:
    assert resolve(ClaaFlags(policy="always"), 8).policy == "always"
    with pytest.raises(ConfigError, match="--claa-policy 'never'.*auto prunes a prompt only where"):
        resolve(ClaaFlags(policy="never"), 8)
