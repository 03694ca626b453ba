"""Tensor-parallel ranks rank as one that has all heads, and what fails on one of them has failed on all."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from claa_sglang.forward.ranks import RankFailed, RanksDiffer
from claa_sglang.forward.scorers import KernelScorer, Scored, Scorer, TorchScorer, in_kernels
from claa_sglang.kernels import fold, window_attention
from claa_sglang.ranking import rankers, spec
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState
from tests import interpreter
from tests.fast import states
from tests.fast.forward.test_late_pass import kept
from tests.fast.late_world import HEADS as WORLD_HEADS
from tests.fast.late_world import KV_HEADS as WORLD_KV_HEADS
from tests.fast.late_world import ONE_STEP, TWO_STEPS, World
from tests.fast.thread_ranks import ThreadRanks, on_ranks

HEADS, KV_HEADS, DIM, TOKENS, LAYERS = 8, 4, 16, 60, 3
CONFIG = msgspec.structs.replace(states.CONFIG, window=16)
NAMES = (
    *("claa", "claa:last=off", "claa:paper", "claa:heads=sum", "claa:zscore=off", "claa:pool=after"),
    *("last-query", "fastkv", "gemfilter", "uniform"),
)


def scored(request: int, ranker: str) -> Scored:
    state = RequestState.pruned_request(RequestOptions(ranker=ranker), CONFIG, TOKENS)
    return Scored(request, state, request * CONFIG.window, request, TOKENS)


def layers(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shapes = (count * CONFIG.window, HEADS, DIM), (count * TOKENS, KV_HEADS, DIM)
    return [tuple(2 * torch.randn(shape, generator=generator) for shape in shapes) for _ in range(LAYERS)]  # type: ignore[misc]


def score(scorer: Scorer, given: list[tuple[Tensor, Tensor]], ranks: Any) -> None:
    """Every layer, of the heads that this rank has; of all, without ranks."""
    size, rank = (ranks.size, ranks.rank) if ranks else (1, 0)
    for queries, keys in given:
        own = [x.chunk(size, dim=1)[rank].contiguous() for x in (queries, keys)]
        scorer.score(*own, 0.25)


def test_ranks_of_some_heads_rank_as_one_that_has_all() -> None:
    table = torch.randperm(len(NAMES) * TOKENS).view(len(NAMES), TOKENS)
    given = layers(len(NAMES))

    def rank(ranks: Any) -> list[Tensor]:
        scorer = TorchScorer([scored(i, name) for i, name in enumerate(NAMES)], table, CONFIG)
        score(scorer, given, ranks)
        if ranks:
            scorer.merge(ranks)
        return [scorer.ranking(i) for i in range(len(NAMES))]

    whole = rank(None)
    for size in (2, 4):
        first, *others = on_ranks(size, rank)
        for other in others:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))
        for name, mine, all_heads in zip(NAMES, first, whole, strict=True):
            torch.testing.assert_close(mine, all_heads, rtol=1e-5, atol=1e-5, msg=name)


def test_so_do_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "claa"  # looks twice
    monkeypatch.setattr(window_attention, "window_mass", interpreter.load("window_attention").window_mass)
    monkeypatch.setattr(fold, "fold", interpreter.load("fold").fold)
    ranker = in_kernels(spec.parse(name), CONFIG)
    assert ranker is not None and len(ranker.looks) == 2
    table, given = torch.randperm(2 * TOKENS).view(2, TOKENS).int(), layers(2)[:2]

    def scorer(ranks: Any) -> KernelScorer:
        made = KernelScorer([scored(i, name) for i in range(2)], table, CONFIG, ranker)
        score(made, given, ranks)
        return made

    # Triton's interpreter is not for threads: they score one after the other, and then meet.
    parts = [scorer(SimpleNamespace(rank=rank, size=2)) for rank in range(2)]

    def rank(ranks: ThreadRanks) -> list[Tensor]:
        parts[ranks.rank].merge(ranks)
        assert ranks.log == ["largest"]  # one reduction, of all requests and looks
        return [parts[ranks.rank].ranking(i) for i in range(2)]

    first, second = on_ranks(2, rank)
    whole = scorer(None)
    for i in range(2):
        assert torch.equal(first[i], second[i])
        torch.testing.assert_close(first[i], whole.ranking(i), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("statistic", rankers.STATISTICS)
def test_the_statistic_of_a_layer_is_that_of_its_parts(statistic: Any) -> None:
    (queries, keys), *_ = layers(1)
    window = queries[: CONFIG.window]
    whole = rankers.STATISTICS[statistic](window, keys, scaling=0.25)
    assert whole.shape[0] == rankers.row_count(statistic, KV_HEADS)
    parts = [
        rankers.STATISTICS[statistic](q, k, scaling=0.25)
        for q, k in zip(window.chunk(2, dim=1), keys.chunk(2, dim=1), strict=True)
    ]
    torch.testing.assert_close(rankers.of_all_heads(statistic, parts), whole)


# --- a whole forward ---


def world_of(ranks: Any, steps: Any) -> World:
    """A world whose keys and queries are those of one rank's heads."""
    world = World(steps)
    own = slice(ranks.rank * WORLD_KV_HEADS // 2, (ranks.rank + 1) * WORLD_KV_HEADS // 2)
    group = WORLD_HEADS // WORLD_KV_HEADS
    world.keys = world.keys[..., own, :]
    world.queries = world.queries[..., own.start * group : own.stop * group, :]
    world.key_buffers = world.key_buffers[..., own, :].contiguous()
    world.ranks = ranks
    return world


@pytest.mark.parametrize("steps", [ONE_STEP, TWO_STEPS], ids=["one-step", "two-steps"])
def test_ranks_keep_what_one_keeps(steps: Any) -> None:
    def run(ranks: Any) -> list[list[list[int]]]:
        world = world_of(ranks, steps) if ranks else World(steps)
        requests = [world.add(text=1, prompt=40), world.add(text=2, prompt=23)]
        dense = world.add(text=3, prompt=9, pruned=False)
        world.extend([(requests[0], 16), (dense, 9)])
        world.extend([(requests[0], 24), (requests[1], 23)])
        world.decode([*requests, dense])
        return [kept(request) for request in requests]

    assert on_ranks(2, run) == [run(None)] * 2


def test_a_request_that_fails_on_one_rank_fails_on_all_and_alone() -> None:
    def run(ranks: ThreadRanks) -> list[str | None]:
        world = world_of(ranks, ONE_STEP)
        requests = [world.add(text=1, prompt=20), world.add(text=2, prompt=20)]
        if ranks.rank == 1:
            world.ranked = planted(requests[0].state)
        world.extend([(request, 20) for request in requests])
        late = world.last
        assert late is not None
        late.agree_on_failures(None)
        return [request.state.progress.error for request in requests]

    def planted(state: Any) -> Callable[[Tensor], Tensor]:
        def fail(ranking: Tensor) -> Tensor:
            state.progress.error or state.progress.fail("scoring its prompt", RuntimeError("planted"))
            return ranking

        return fail

    first, second = on_ranks(2, run)
    assert first[1] is None and second[1] is None
    assert first[0] is not None and "RankFailed: another tensor-parallel rank failed here" in first[0]
    assert second[0] is not None and "planted" in second[0]


def test_a_scorer_that_fails_on_one_rank_leaves_no_other_alone() -> None:
    """What it did not score has its place in what ranks exchange."""
    table, given = torch.arange(2 * TOKENS).view(2, TOKENS), layers(2)

    def rank(ranks: ThreadRanks) -> tuple[list[Tensor], list[str | None]]:
        requests = [scored(0, "claa"), scored(1, "fastkv")]
        scorer = TorchScorer(requests, table, CONFIG)
        if ranks.rank == 1:
            scorer._rankers[0] = Failing()  # type: ignore[assignment]
        score(scorer, given, ranks)
        scorer.merge(ranks)
        return [scorer.ranking(i) for i in range(2)], [one.state.progress.error for one in requests]

    class Failing(rankers.Claa):
        def score_layer(self, q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
            raise RuntimeError("planted")

    (mine, errors), (theirs, failed) = on_ranks(2, rank)
    assert torch.equal(mine[1], theirs[1]) and mine[0].shape == theirs[0].shape
    assert errors == [None, None] and failed[0] is not None and failed[1] is None


@pytest.mark.parametrize("failing", [0, 1])
def test_what_one_rank_does_by_itself_fails_on_all(failing: int) -> None:
    def run(ranks: ThreadRanks) -> str:
        world = world_of(ranks, ONE_STEP)
        request = world.add(text=1, prompt=20)
        world.extend([(request, 20)])
        assert world.last is not None
        with pytest.raises((RankFailed, ValueError)) as caught:
            world.last.agree_on_failures(ValueError("planted") if ranks.rank == failing else None)
        return type(caught.value).__name__

    found = on_ranks(2, run)
    assert found[failing] == "ValueError" and found[1 - failing] == "RankFailed"


@pytest.mark.parametrize("steps", [ONE_STEP, TWO_STEPS], ids=["one-step", "two-steps"])
def test_nobody_ranks_a_request_that_failed_before(steps: Any) -> None:
    """Where it failed, one rank had ranked it and the other had not: they would wait for each other."""

    def run(ranks: ThreadRanks) -> list[Any]:
        world = world_of(ranks, steps)
        failed, beside = world.add(text=1, prompt=20), world.add(text=2, prompt=20)
        assert failed.state is not None
        if ranks.rank == 0:
            failed.state.progress.kept[0] = torch.arange(failed.state.plan.kept_counts[0])
        failed.state.progress.fail("running its late layers", RuntimeError("planted"))
        world.extend([(failed, 20), (beside, 20)])
        assert world.last is not None
        world.last.agree_on_failures(None)
        assert len(world.rankings) == len(steps)  # of the other one
        return [ranks.log, kept(beside), beside.state.progress.error if beside.state else None]

    first, second = on_ranks(2, run)
    assert first == second and first[2] is None


def test_ranks_that_keep_different_tokens_are_told_where_they_are_compared() -> None:
    def run(ranks: ThreadRanks, compared: bool) -> None:
        world = world_of(ranks, ONE_STEP)
        ranks.checked = compared
        world.ranked = lambda ranking: torch.roll(ranking, ranks.rank)
        request = world.add(text=1, prompt=20)
        world.extend([(request, 20)])
        assert world.last is not None
        world.last.agree_on_failures(None)

    with pytest.raises(RanksDiffer, match="did not keep the same tokens"):
        on_ranks(2, lambda ranks: run(ranks, True))
    on_ranks(2, lambda ranks: run(ranks, False))
