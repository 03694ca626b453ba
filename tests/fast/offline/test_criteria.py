"""Bounds and margins of a choice, against numbers worked out otherwise."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import beta

from claa_sglang.offline.calibrate.criteria import (
    least_for_most,
    least_prompts,
    lower_bounds,
    margins,
    measured,
    measured_all,
    whole_bound,
    whole_together,
)
from claa_sglang.offline.calibrate.evidence import Kept
from claa_sglang.offline.calibrate.target import Target

NAN = float("nan")
TARGET = Target(mass=0.8, recall=0.9, whole=0.5)


def kept(mass: list[float], recall: list[float], lengths: list[int] | None = None) -> Kept:
    """One rate. A prompt is whole where its recall is 1."""
    shares = torch.tensor([recall])
    whole = (shares == 1).float().masked_fill(shares.isnan(), NAN)
    return Kept(torch.tensor([mass]), shares, whole, shares[0], torch.tensor(lengths or [0] * len(mass)))


def test_the_bound_covers_the_truth_as_often_as_it_says() -> None:
    rng = torch.Generator().manual_seed(1)
    covered = sum(lower_bounds(torch.rand(1, 40, generator=rng))[0].low <= 0.5 for _ in range(200))
    assert 180 <= covered <= 198  # 190 expected of 200, standard deviation 3
    assert lower_bounds(torch.ones(1, 9)) == [(1.0, 1.0, 9)]
    assert lower_bounds(torch.tensor([[1.0, NAN]]))[0].low == float("-inf")
    assert lower_bounds(torch.full((1, 3), NAN))[0].prompts == 0


def test_many_choices_are_bounded_as_each_alone() -> None:
    values = torch.rand(5, 30, generator=torch.Generator().manual_seed(2))
    values[:, 4] = NAN
    for found, row in zip(lower_bounds(values), values, strict=True):
        assert found == pytest.approx(lower_bounds(row[None])[0])


@pytest.mark.parametrize(("ones", "prompts"), [(16, 16), (57, 60), (0, 9), (1, 2)])
def test_the_bound_of_a_share_is_exact(ones: int, prompts: int) -> None:
    values = torch.tensor([1.0] * ones + [0.0] * (prompts - ones) + [NAN, NAN])
    found = whole_bound(values, 0.99)
    low = beta.ppf(0.01, ones, prompts - ones + 1) if ones else 0.0
    assert (found.prompts, found.mean) == (prompts, ones / prompts) and found.low == pytest.approx(low)


def test_how_many_prompts_a_bound_takes() -> None:
    assert (least_prompts(0.95), least_prompts(0.95, 0.99), least_prompts(0.0)) == (59, 90, 0)
    assert whole_bound(torch.ones(59)).low >= 0.95 > whole_bound(torch.ones(58)).low


def test_a_margin_is_the_worst_of_criteria_and_lengths() -> None:
    one = kept([0.9, 0.9, 0.9, 0.7], [1.0, 1.0, 1.0, 0.96])
    assert float(margins(one, TARGET)[0]) == pytest.approx(0.05)  # of mass, 0.85
    assert float(margins(one, TARGET._replace(mass=0.5))[0]) == pytest.approx(0.09)  # of recall, 0.99
    assert float(margins(one, TARGET._replace(mass=0.5, whole=0.74))[0]) == pytest.approx(0.01)  # of whole, 0.75
    two = kept([0.9, 0.9, 0.9, 0.7], [1.0, 1.0, 1.0, 0.96], [1024, 1024, 1024, 4096])
    assert float(margins(two, TARGET._replace(mass=0.5))[0]) == pytest.approx(-0.5)  # at 4096 none is whole
    assert float(margins(kept([0.9, 0.7], [NAN, NAN]), TARGET)[0]) == pytest.approx(
        0.0, abs=1e-6
    )  # mass alone is known
    known_at_one = kept([0.9, 0.9], [1.0, NAN], [1024, 4096])
    assert float(margins(known_at_one, TARGET)[0]) == pytest.approx(0.1)


def test_what_is_missed_is_said_with_the_length() -> None:
    good = kept([0.9] * 20, [1.0] * 20)
    assert measured(good).misses(TARGET) == ""
    few = measured(kept([0.9] * 3, [1.0] * 3))
    assert few.misses(TARGET._replace(whole=0.5)) == "whole answers 1.000, at least 0.368, wanted 0.500 (3 prompts)"
    assert few.misses(TARGET, whole_by_mean=True) == ""
    part = measured(kept([0.9] * 20, [1.0] * 19 + [0.99], [4096] * 19 + [1024]))
    assert part.misses(TARGET) == "whole 0.000 at 1024 tokens, wanted 0.500"
    assert "mass 0.700, at least 0.700, wanted 0.800" in measured(kept([0.7] * 9, [1.0] * 9)).misses(TARGET)
    half = measured(kept([0.9] * 20, [0.99] * 20))
    assert half.misses(TARGET, whole_by_mean=True) == "whole answers 0.000, wanted 0.500"


def test_choices_measured_together_are_measured_as_alone() -> None:
    choices = [kept([0.9, 0.8, 0.7], [1.0, 0.5, NAN], [1, 1, 2]), kept([0.1, 0.2, 0.3], [1.0, 1.0, NAN], [1, 1, 2])]
    assert repr(measured_all(choices)) == repr([measured(one) for one in choices])
    assert whole_together(choices) == whole_bound(torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_the_lowest_rate_at_which_most_prompts_are_whole() -> None:
    one = kept([0.9] * 5, [0.1, 0.4, NAN, 0.2, float("inf")])
    assert [least_for_most(one, share) for share in (0.25, 0.5, 0.75)] == pytest.approx([0.1, 0.2, 0.4])
    assert least_for_most(one, 0.95) == 1.0  # it lost the answer of one
    assert least_for_most(kept([0.9], [NAN]), 0.95) == 0.0
