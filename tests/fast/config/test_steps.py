"""Several prunes: what must hold between their layers and rates, and how later rates follow the first."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_sglang.config.config import ClaaConfig, ConfigError
from claa_sglang.config.flags import ClaaFlags, resolve
from tests.fast.config.profiles import TWO_STEPS


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
