"""When two answers are the same, when rounding explains that they are not, and when it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from claa_sglang.verify.client import Answer
from claa_sglang.verify.compare import FLOAT32, FP8, HALF, Noise, compare, counted, noise_of, undecided, verdict


def answer(tokens: list[int], leads: dict[int, float] | None = None, kept: list[int] | None = None) -> Answer:
    """leads: by which the token at a place leads over the next higher and lower ids; else by 1."""
    tops = []
    for place, token in enumerate(tokens):
        lead = (leads or {}).get(place, 1.0)
        tops.append({token: -0.5, token + 1: -0.5 - lead, token - 1: -0.5 - lead})
    report = {"pruned": kept is not None, **({} if kept is None else {"kept": kept})}
    return Answer(None, tokens, [-0.5] * len(tokens), tops, report, 100, 0, 0.0, 1.0)


BASE = [10, 20, 30, 40]


def test_the_same_answer() -> None:
    found = compare("a", answer(BASE), answer(BASE), FLOAT32)
    assert (found.outcome, found.tokens, found.position, found.apart) == ("identical", 4, None, 0)


@pytest.mark.parametrize(
    ("mine", "theirs", "noise", "outcome"),
    [
        (5e-5, 5e-5, FLOAT32, "near-tie"),
        (5e-5, 2e-4, FLOAT32, "different"),  # a tie on one side alone is none
        (2e-4, 5e-5, FLOAT32, "different"),
        (0.2, 0.2, FLOAT32, "different"),
        (0.2, 0.2, HALF, "near-tie"),
        (0.3, 0.1, HALF, "different"),
        (0.3, 0.1, FP8, "near-tie"),
    ],
)
def test_another_token(mine: float, theirs: float, noise: Noise, outcome: str) -> None:
    one, other = answer(BASE, {2: mine}), answer([10, 20, 31, 7], {2: theirs})
    found = compare("a", one, other, noise)
    assert (found.outcome, found.position) == (outcome, 2) and found.lead == pytest.approx(max(mine, theirs))
    assert f"{max(mine, theirs):.2g} nats" in found.why


def test_a_token_that_was_never_likely() -> None:
    found = compare("a", answer(BASE), answer([10, 99, 30, 40]), FP8)
    assert (found.outcome, found.position, found.lead) == ("different", 1, None)
    assert "not among the 5 likeliest" in found.why


def test_an_answer_that_ends_early() -> None:
    assert compare("a", answer(BASE), answer(BASE[:3]), FP8).outcome == "different"


def test_the_same_tokens_with_other_probabilities() -> None:
    off = dataclasses.replace(answer(BASE), chosen=[-0.5, -0.5, -0.52, -0.5])
    assert compare("a", answer(BASE), off, FLOAT32).outcome == "different"
    assert compare("a", answer(BASE), off, HALF).outcome == "identical"


def shifted(count: int) -> list[int]:
    """100 positions, of which so many are others than in range(100)."""
    return [*range(100 - count), *range(200, 200 + count)]


@pytest.mark.parametrize(
    ("others", "noise", "outcome"),
    [(1, FLOAT32, "identical"), (2, FLOAT32, "different"), (1, HALF, "identical"), (2, HALF, "different"),
     (2, FP8, "identical")],
)  # fmt: skip
def test_kept_positions_may_differ_at_the_edge_alone(others: int, noise: Noise, outcome: str) -> None:
    found = compare("a", answer(BASE, kept=shifted(0)), answer(BASE, kept=shifted(others)), noise)
    assert (found.outcome, found.kept, found.kept_apart) == (outcome, 100, 2 * others)


def test_answers_that_part_after_another_edge_are_undecided() -> None:
    """Other positions make other late layers: how near the tokens are says nothing."""
    one = answer(BASE, kept=shifted(0))
    assert compare("a", one, answer([10, 20, 31, 7], kept=shifted(1)), HALF).outcome == "undecided"
    assert compare("a", one, answer([10, 20, 31, 7], kept=shifted(0)), HALF).outcome == "different"


def test_the_verdict_of_several() -> None:
    same, tie = (compare("a", answer(BASE, {2: 0}), answer(end, {2: 0}), HALF) for end in (BASE, [10, 20, 31, 7]))
    wrong, open_ = compare("a", answer(BASE), answer([1, 2, 3, 4]), HALF), undecided("a", "why")
    assert verdict([same, tie, open_]) is True and verdict([tie, open_]) is None and verdict([]) is None
    assert verdict([same, tie, wrong]) is False
    assert counted([same, tie, same, tie]) == "2 identical, 2 near-ties"
    assert counted([tie, wrong, open_]) == "1 near-tie, 1 different, 1 undecided"


@pytest.mark.parametrize(
    ("info", "noise"),
    [
        ({"dtype": "float32", "kv_cache_dtype": "auto"}, FLOAT32),
        ({"dtype": "auto", "kv_cache_dtype": "auto"}, HALF),
        ({"dtype": "bfloat16"}, HALF),
        ({"dtype": "bfloat16", "kv_cache_dtype": "fp8_e4m3"}, FP8),
    ],
)
def test_noise_follows_the_server_s_numbers(info: dict[str, Any], noise: Noise) -> None:
    assert noise_of(info) == noise
