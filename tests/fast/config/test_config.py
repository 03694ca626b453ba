"""Flags become one consistent configuration, or a refusal that names the flag and the remedy."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_sglang.config.config import ClaaConfig, ConfigError, PruneStep
from claa_sglang.config.flags import HELP, ClaaFlags, resolve
from tests.fast.config.profiles import TWO_STEPS
from tests.fast.consistent import assert_consistent


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
        scorer="auto",
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


def test_the_ranker_is_checked() -> None:
    assert resolve(ClaaFlags(ranker="fastkv"), 8).ranker == "fastkv"
    with pytest.raises(ConfigError, match="--claa-ranker: .*no such name; give claa, "):
        resolve(ClaaFlags(ranker="snapkv"), 8)


def test_the_policy_is_checked() -> None:
    assert resolve(ClaaFlags(policy="always"), 8).policy == "always"
    assert resolve(ClaaFlags(scorer="flashinfer"), 8).scorer == "flashinfer"
    with pytest.raises(ConfigError, match="--claa-policy 'never'.*auto prunes a prompt only where"):
        resolve(ClaaFlags(policy="never"), 8)


def test_observing_is_of_one_prune() -> None:
    assert not resolve(ClaaFlags(), 8).observes and resolve(ClaaFlags(mode="observe"), 8).observes
    with pytest.raises(ConfigError, match="--claa-mode observe: .*second prune.*Give one prune"):
        resolve(ClaaFlags(mode="observe", schedule="3:0.4,5:0.2"), 8)
    with pytest.raises(ConfigError, match="--claa-mode 'watch'"):
        resolve(ClaaFlags(mode="watch"), 8)


@pytest.mark.parametrize("rate", [0, 0.05, 1])
def test_a_shadow_rate_is_a_share(rate: float) -> None:
    assert resolve(ClaaFlags(), 8).shadow_rate == 0 and resolve(ClaaFlags(shadow_rate=rate), 8).shadow_rate == rate
    for wrong in (-0.1, 1.1, math.nan, "much", True):
        with pytest.raises(ConfigError, match=r"--claa-shadow-rate .*0 to 1 \(default 0\)"):
            resolve(ClaaFlags(shadow_rate=wrong), 8)


def test_a_server_that_prunes_nothing_has_no_pruned_answers_to_compare() -> None:
    assert resolve(ClaaFlags(mode="observe", shadow_rate=0), 8).observes
    with pytest.raises(ConfigError, match="--claa-shadow-rate 0.1: .*prunes nothing.*Leave out --claa-shadow-rate, or"):
        resolve(ClaaFlags(mode="observe", shadow_rate=0.1), 8)


@pytest.mark.parametrize(("dense", "layers"), [(None, []), (0, [0, 1, 2, 3]), (2, [2, 3]), (3, [3]), (4, []), (99, [])])
def test_layers_that_decode_over_kept_tokens_end_at_the_first_prune(dense: int | None, layers: list[int]) -> None:
    config = resolve(ClaaFlags(schedule="3:0.4,5:0.2", decode_dense_layers=dense), 8)
    assert list(config.kept_layers) == layers
    assert config.row_kinds == (3 if layers else 2)


@pytest.mark.parametrize("value", [-1, True, 1.5, "2"])
def test_dense_layers_of_decoding_are_a_count(value: Any) -> None:
    with pytest.raises(ConfigError, match="--claa-decode-dense-layers .*0 or more"):
        resolve(ClaaFlags(decode_dense_layers=value), 8)
