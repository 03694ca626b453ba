"""Which way a prompt takes where pruned prefixes are made dense while the server is idle."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.policy.cost import Constants, CostModel
from claa_sglang.policy.policy import Hits, Policy, Prompt
from claa_sglang.policy.prefix_uses import Uses

STEP = PruneStep(prune_layer=15, keep_rate=0.2, score_layers=(12, 13, 14, 15))
CONFIG = ClaaConfig(steps=(STEP,), num_layers=32)
H200 = Constants(per_pass=5e-4, per_row=7.2e-7, per_pair=2.7e-11, per_prune=1e-3)


def policy_with(share: float) -> Policy:
    return Policy(CONFIG, CostModel(H200), 8192, finished_share=lambda: share)


def test_a_short_first_turn_is_pruned_where_prefixes_are_finished_in_time() -> None:
    """Whoever goes on from it then pays nothing for it."""
    prompt = Prompt(1030, (STEP,), Hits(0, 0))
    left, right = (policy_with(share).choose(prompt) for share in (0.0, 1.0))
    assert not left.prune and left.reason.startswith("dense, cached for later")
    assert right.prune and right.reason.startswith("pruned is faster")


def test_a_document_that_is_asked_about_for_ever_stays_pruned_where_it_is_finished_in_time() -> None:
    for share, prunes in ((0.0, False), (1.0, True)):
        prompt = Prompt(4020, (STEP,), Hits(0, 4000), uses=lambda: Uses(100.0))
        assert policy_with(share).choose(prompt).prune == prunes


def test_samples_are_charged_whatever_is_finished() -> None:
    """They are there before the server is idle."""
    step = PruneStep(prune_layer=15, keep_rate=0.05, score_layers=(15,))
    prompt = Prompt(4000, (step,), Hits(0, 0), answers=False)
    ways = [policy_with(share).choose(prompt._replace(samples=20)) for share in (0.0, 1.0)]
    assert [way.prune for way in ways] == [False, False]


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.integers(100, 40_000),
    hits=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    uses=st.builds(Uses, st.floats(0, 50), st.booleans()),
    samples=st.sampled_from([1, 1, 1, 4]),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_the_more_is_finished_in_time_the_more_is_pruned(
    tokens: int, hits: tuple[float, float], uses: Uses, samples: int, shares: tuple[float, float]
) -> None:
    """And with none, all is as it is without finishing."""
    cached = Hits(int(hits[0] * (tokens - 1)), int(hits[1] * (tokens - CONFIG.window)))
    prompt = Prompt(tokens, (STEP,), cached, uses=lambda: uses, samples=samples)
    assert policy_with(0.0).choose(prompt) == Policy(CONFIG, CostModel(H200), 8192).choose(prompt)
    lower, higher = (policy_with(share).choose(prompt).prune for share in sorted(shares))
    assert higher or not lower


def test_a_reason_names_what_was_finished_where_it_decided() -> None:
    prompt = Prompt(4100, (STEP,), Hits(4000, 0), finished=3968)
    choice = policy_with(0.5).choose(prompt)
    assert not choice.prune
    assert choice.reason.startswith("its first 3968 tokens were finished while the server was idle: pruned ")
    assert "(estimated)" in choice.reason
    # Nothing was finished; it was, and is not cached any more, so that a short prompt is dense for its own sake.
    for other in (prompt._replace(finished=0), Prompt(20, (STEP,), Hits(0, 0), finished=128)):
        assert policy_with(0.5).choose(other).reason.startswith("dense is not slower")


@pytest.mark.parametrize(
    ("tokens", "hits", "finished", "follows"),
    [
        pytest.param(4100, Hits(4000, 0), 4000, True, id="a short question after it"),
        pytest.param(4100, Hits(4000, 3900), 4000, True, id="its pruned copy, too, is there still"),
        pytest.param(40_000, Hits(4000, 0), 4000, False, id="a long new text after it"),
        pytest.param(4100, Hits(0, 0), 4000, False, id="its dense KV was evicted"),
        pytest.param(4100, Hits(4000, 0), 0, False, id="dense, but nothing of it finished"),
        pytest.param(4100, Hits(4000, 0), 128, False, id="dense, but little of it finished"),
        pytest.param(4100, Hits(128, 0), 4000, False, id="little of it is left"),
    ],
)
def test_pruning_at_any_price_follows_a_finished_prefix_where_that_is_no_more_rows(
    tokens: int, hits: Hits, finished: int, follows: bool
) -> None:
    reason = policy_with(0.5).follows(tokens, (STEP,), hits, finished)
    expected = f"its first {finished} tokens were finished while the server was idle: dense computes less"
    assert reason == (expected if follows else None)


def test_a_keep_rate_of_one_follows_what_is_there_alone() -> None:
    """Both ways are the same rows then."""
    step = PruneStep(prune_layer=15, keep_rate=1.0, score_layers=(15,))
    policy = policy_with(0.5)
    assert policy.follows(4100, (step,), Hits(0, 0), 4000) is None
    assert policy.follows(4100, (step,), Hits(4000, 0), 4000) is not None


def test_it_follows_exactly_where_dense_has_no_more_rows() -> None:
    policy = policy_with(0.5)
    for new in (500, 2000, 4000, 8000, 16_000):
        prompt, hits = 4000 + new, Hits(4000, 0)
        rows = policy._dense(4000, prompt).rows, policy._pruned((STEP,), 0, prompt).rows
        assert (policy.follows(prompt, (STEP,), hits, 4000) is not None) == (rows[0] <= rows[1])
