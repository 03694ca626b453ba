"""The interval of the ratio, what is claimed of it, and how much is asked of which server."""

from __future__ import annotations

import argparse
import random
from typing import Any

import pytest

from claa_sglang import cli
from claa_sglang.verify import plan
from claa_sglang.verify.claims import faster
from claa_sglang.verify.error import VerifyError
from claa_sglang.verify.ttft import Times, median_interval, ratio


@pytest.mark.parametrize(
    ("count", "place", "coverage"),
    [(5, 0, 1 - 2 / 32), (6, 0, 1 - 2 / 64), (9, 1, 1 - 20 / 512), (12, 2, 1 - 2 * 79 / 4096)],
)
def test_the_interval_of_a_median(count: int, place: int, coverage: float) -> None:
    values = random.Random(0).sample([float(n) for n in range(count)], count)
    found = median_interval(values)
    assert (found.median, found.low, found.high) == ((count - 1) / 2, place, count - 1 - place)
    assert found.coverage == pytest.approx(coverage)


def test_it_covers_as_often_as_it_says() -> None:
    """Of a skewed distribution, as times beside traffic are; its median is log 2."""
    rng, hits, rounds = random.Random(1), 0, 4000
    for _ in range(rounds):
        found = median_interval([rng.expovariate(1.0) for _ in range(9)])
        hits += found.low <= 0.6931 <= found.high
    assert hits / rounds == pytest.approx(1 - 20 / 512, abs=0.01)


def times(*ratios: float) -> Times:
    return Times([0.1 * one for one in ratios], [0.1] * len(ratios), [100] * len(ratios), [])


@pytest.mark.parametrize(
    ("ratios", "at_most", "ok"),
    [
        ((0.5, 0.5, 0.6, 0.6, 0.7), 1.0, True),
        ((0.5, 0.5, 0.6, 0.6, 0.7), 0.65, None),
        ((0.5, 0.5, 0.6, 0.6, 0.7), 0.45, False),
        ((1.1, 1.2, 1.3, 1.4, 1.5), 1.0, False),
        ((0.5, 0.5, 0.5, 0.5), 1.0, None),
    ],
)
def test_the_whole_interval_is_held_against_the_claim(ratios: tuple[float, ...], at_most: float, ok: bool) -> None:
    assert faster(times(*ratios), at_most).ok is ok


def test_one_pair_that_waited_does_no_harm() -> None:
    found = ratio(times(*[0.6] * 8, 9.0))
    assert found is not None and (found.low, found.median, found.high) == (pytest.approx(0.6),) * 3


# --- how much is asked


def made(*words: str, **info: Any) -> plan.Plan:
    args: argparse.Namespace = cli._parser().parse_args(["verify", *words])
    config = {"window": 32, "min_prompt_tokens": info.pop("least", 1024)}
    return plan.make(args, {"claa": {"config": config}, **info})


def test_lengths_follow_the_server() -> None:
    large = made(max_total_num_tokens=2_000_000, max_req_input_len=100_000)
    assert (large.tokens, large.ttft_tokens) == (1280, 8192) and large.entered < 0.25 * 2_000_000
    small = made(max_total_num_tokens=20_000, max_req_input_len=8000)
    assert (small.tokens, small.ttft_tokens) == (1280, 1280)
    assert "turns the whole cache over" in small.lines[-1] and "turns" not in large.lines[-1]
    assert made(least=4000).tokens == 5000
    assert made("--ttft-tokens", "4096", max_total_num_tokens=20_000).ttft_tokens == 4096
    assert made(max_total_num_tokens=2_000_000, max_req_input_len=5000).ttft_tokens == 4096


@pytest.mark.parametrize(
    ("words", "info", "says"),
    [
        (("--tokens", "1024"), {}, "above 1024 tokens (--claa-min-prompt-tokens)"),
        (("--tokens", "32"), {"least": 0}, "above 32 tokens (--claa-window)"),
        (("--tokens", "3000"), {"max_req_input_len": 3000}, "takes prompts of 3000 tokens"),
    ],
)
def test_lengths_that_cannot_be_pruned(words: tuple[str, ...], info: dict[str, Any], says: str) -> None:
    with pytest.raises(VerifyError) as caught:
        made(*words, **info)
    assert says in str(caught.value)
