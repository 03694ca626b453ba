"""A request's state: its steps, and counts known from the prompt length alone."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState, given_positions

ONE = (PruneStep(prune_layer=3, keep_rate=0.2, score_layers=(2, 3)),)
TWO = (
    PruneStep(prune_layer=1, keep_rate=0.6, score_layers=(0, 1)),
    PruneStep(prune_layer=3, keep_rate=0.3, score_layers=(3,)),
)
RATES = st.none() | st.floats(0.001, 1.0)


def config(steps: tuple[PruneStep, ...], window: int = 8) -> ClaaConfig:
    return ClaaConfig(steps=steps, num_layers=8, window=window)


@pytest.mark.parametrize(("steps", "counts"), [(ONE, (20,)), (TWO, (60, 30))], ids=["one-step", "two-steps"])
def test_the_servers_keep_rate(steps: tuple[PruneStep, ...], counts: tuple[int, ...]) -> None:
    state = RequestState.pruned_request(RequestOptions(), config(steps), prompt_tokens=100)
    assert state.pruned and state.plan.dense_reason is None
    assert state.plan.steps == steps and state.plan.kept_counts == counts and state.plan.prompt_tokens == 100
    assert state.progress.kept == [None] * len(steps) and state.progress.late_computed_tokens == 0


@pytest.mark.parametrize(
    ("keep_rate", "rates", "counts"), [(0.36, [0.36, 0.09], (378, 94)), (1.0, [1.0, 1.0], (1051, 1051))]
)
def test_every_step_follows_the_requests_own_keep_rate(
    keep_rate: float, rates: list[float], counts: tuple[int, ...]
) -> None:
    state = RequestState.pruned_request(RequestOptions(keep_rate=keep_rate), config(TWO), prompt_tokens=1051)
    assert [s.keep_rate for s in state.plan.steps] == pytest.approx(rates)
    assert [s.prune_layer for s in state.plan.steps] == [1, 3]
    assert state.plan.kept_counts == counts and state.progress.late_spans == [(0, 0), (0, 0)]


def test_a_dense_request_says_why() -> None:
    state = RequestState.dense_request(RequestOptions(enabled=False), 100, "the request opted out")
    assert not state.pruned and state.plan.dense_reason == "the request opted out"
    assert state.plan.kept_counts == () and state.progress.kept == [] and state.plan.steps == ()


def test_requests_do_not_share_what_they_kept() -> None:
    first, second = (RequestState.pruned_request(RequestOptions(), config(ONE), 100) for _ in range(2))
    first.progress.kept[0] = object()  # type: ignore[call-overload]
    assert second.progress.kept == [None]
    dense = [RequestState.dense_request(RequestOptions(), 100, "short") for _ in range(2)]
    assert dense[0].progress.kept is not dense[1].progress.kept


def test_the_plan_cannot_be_changed() -> None:
    state = RequestState.pruned_request(RequestOptions(), config(ONE), 100)
    for part, name in ((state, "plan"), (state.plan, "kept_counts"), (state.plan, "dense_reason")):
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, getattr(part, name))


def test_scheduling_starts_again_with_what_was_ranked() -> None:
    progress = RequestState.pruned_request(RequestOptions(), config(TWO), 100).progress
    kept = torch.arange(60)
    progress.kept[0], progress.late_computed_tokens, progress.late_spans = kept, 60, [(30, 60), (0, 8)]
    progress.last_slots, progress.error = torch.tensor([3]), "failed"
    progress.reset_scheduling()
    assert progress.late_spans == [(0, 0), (0, 0)] and progress.last_slots is None
    assert progress.kept[0] is kept and progress.late_computed_tokens == 60 and progress.error == "failed"


@pytest.mark.parametrize(
    ("keep", "prompt", "positions"),
    [
        ([], 20, [0, *range(12, 20)]),
        ([3, 15], 20, [0, 3, *range(12, 20)]),
        ([0, 3, 11], 20, [0, 3, 11, *range(12, 20)]),
        ([14, 19], 20, [0, *range(12, 20)]),  # what the window has already
        ([], 9, list(range(9))),
        ([2], 8, list(range(8))),  # no more than a window
        ([], 5, list(range(5))),
    ],
)
def test_positions_that_a_client_gives_are_kept_with_the_first_token_and_the_window(
    keep: list[int], prompt: int, positions: list[int]
) -> None:
    assert given_positions(keep, prompt, window=8) == positions


@given(prompt=st.integers(1, 60), window=st.integers(1, 12), data=st.data())
def test_any_positions_stay_in_order(prompt: int, window: int, data: st.DataObject) -> None:
    keep = sorted(data.draw(st.sets(st.integers(0, prompt - 1))))
    positions = given_positions(keep, prompt, window)
    always = {0, *range(max(0, prompt - window), prompt)}
    assert positions == sorted({*keep, *always})


@given(prompt=st.integers(1, 5000), rate=RATES, window=st.integers(1, 64), steps=st.sampled_from([ONE, TWO]))
def test_each_step_keeps_a_part_of_the_one_before(prompt: int, rate: float | None, window: int, steps: tuple) -> None:
    state = RequestState.pruned_request(RequestOptions(keep_rate=rate), config(steps, window), prompt)
    before = prompt
    for count in state.plan.kept_counts:
        assert min(window, prompt) <= count <= before
        before = count
    assert len(state.plan.kept_counts) == len(state.progress.kept) == len(state.plan.steps) == len(steps)


@pytest.mark.parametrize(
    ("server", "asked", "rate", "found"),
    [
        (None, None, 0.2, None),
        (1, None, 0.2, 1),
        (1, 1, 0.2, 1),
        (1, 99, 0.2, None),
        (1, None, 1.0, None),
        (None, 99, 0.2, None),
    ],
)
def test_whose_early_layers_decode_over_kept_tokens(server: Any, asked: Any, rate: float, found: Any) -> None:
    """Where nothing is dropped there is nothing to leave out."""
    made = msgspec.structs.replace(config(ONE, 8), decode_dense_layers=server)
    options = RequestOptions(keep_rate=rate, decode_dense_layers=asked)
    assert RequestState.pruned_request(options, made, 200).plan.decode_dense_layers == found
