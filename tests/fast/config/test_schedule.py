"""--claa-schedule: several prune steps in one flag, or a refusal that names it and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_sglang.config.config import ConfigError, PruneStep
from claa_sglang.config.flags import ClaaFlags, resolve
from tests.fast.config.profiles import PROFILE
from tests.fast.consistent import assert_consistent


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("14:0.4", [(14, 0.4, (11, 12, 13, 14))]),
        ("1:1", [(1, 1.0, (0, 1))]),
        ("14:0.4,20:0.15", [(14, 0.4, (11, 12, 13, 14)), (20, 0.15, (17, 18, 19, 20))]),
        ("14:0.4,16:0.15,17:.1", [(14, 0.4, (11, 12, 13, 14)), (16, 0.15, (15, 16)), (17, 0.1, (17,))]),
        ("14:0.4:12+14, 20:1e-1:18", [(14, 0.4, (12, 14)), (20, 0.1, (18,))]),
        ("14:1,20:1.0", [(14, 1.0, (11, 12, 13, 14)), (20, 1.0, (17, 18, 19, 20))]),
    ],
)
def test_a_schedule_gives_the_steps(text: str, steps: list[tuple], tmp_path: Path) -> None:
    expected = tuple(PruneStep(prune_layer=p, keep_rate=r, score_layers=s) for p, r, s in steps)
    assert resolve(ClaaFlags(schedule=text), 30).steps == expected
    (profile := tmp_path / "profile.json").write_text(json.dumps(PROFILE))
    config = resolve(ClaaFlags(schedule=text, profile=str(profile)), 30)
    assert config.steps == expected and config.window == 16  # the rest is the profile's


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is no step. Give the prune steps.*such as 14:0.4,20:0.15"),
        ("14", "'14' is no step"),
        ("14:", "'14:' is no step"),
        ("14:0.4,", "'' is no step"),
        ("14:x", "'14:x' is no step"),
        ("14:nan", "'14:nan' is no step"),
        ("-1:0.4", "'-1:0.4' is no step"),
        ("14:-0.4", "'14:-0.4' is no step"),
        ("14:0.4:", "'14:0.4:' is no step"),
        ("14:0.4:12,14", "'14' is no step"),
        ("14:0.4:12+", "is no step"),
        ("²:0.4", "is no step"),
        ("\udcff", "is no step"),
        ("14:0.4," * 200, "ive the prune steps"),
        (14, "ive the prune steps"),
        ("14:0", r"Expected `float` > 0.* \(prune steps come from --claa-schedule 14:0: correct it\)"),
        ("14:1.5", r"Expected `float` <= 1"),
        ("29:0.4", "29: must be 0 to 28"),
        ("14:0.4:15", "must be layers 0 to 14"),
        ("14:0.4:13+12", "must ascend, each layer once; write 12,13"),
        ("14:0.4,14:0.2", "above the previous step's prune layer 14"),
        ("20:0.4,14:0.2", "above the previous step's prune layer 20"),
        ("14:0.4,20:0.2:14+20", "above the previous step's prune layer 14"),
        ("14:0.4,20:0.4", "keep_rate 0.4 must be below the previous step's 0.4"),
        ("14:1,20:0.4", "layer 14: keep_rate 1 drops nothing"),
    ],
)
def test_a_schedule_that_cannot_be_used_is_refused(text, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        resolve(ClaaFlags(schedule=text), 30)
    assert "--claa-schedule" in str(caught.value)


@pytest.mark.parametrize("other", [{"prune_layer": 14}, {"keep_rate": 0.4}, {"score_layers": "4"}])
def test_a_schedule_beside_a_flag_of_one_step_is_refused(other: dict) -> None:
    (name,) = other
    flag = "--claa-" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"--claa-schedule '14:0.4' and {flag} .*Leave out {flag}, or"):
        resolve(ClaaFlags(schedule="14:0.4", **other), 30)


@given(
    steps=st.lists(st.tuples(st.integers(0, 35), st.sampled_from(["0.5", "0.4", ".3", "0.1", "1", "1.0"])), max_size=3),
    num_layers=st.integers(2, 40),
)
@settings(deadline=None)
def test_schedules_give_a_consistent_config_or_a_config_error(steps: list[tuple[int, str]], num_layers: int) -> None:
    text = ",".join(f"{layer}:{rate}" for layer, rate in steps)
    layers, rates = [layer for layer, _ in steps], [float(rate) for _, rate in steps]
    falls = all(a > b for a, b in zip(rates, rates[1:], strict=False)) and (len(rates) < 2 or rates[0] < 1)
    is_valid = layers == sorted(set(layers)) and 0 < len(steps) and layers[-1] <= num_layers - 2
    if not (is_valid and (falls or set(rates) == {1.0})):
        with pytest.raises(ConfigError, match="--claa-schedule"):
            resolve(ClaaFlags(schedule=text), num_layers)
        return
    config = resolve(ClaaFlags(schedule=text), num_layers)
    assert [(step.prune_layer, step.keep_rate) for step in config.steps] == list(zip(layers, rates, strict=True))
    assert_consistent(config, num_layers)
