"""Which scorer a batch gets, and that each request is ranked by its own ranker.

The kernels' scorer runs in Triton's interpreter here; on a real GPU: tests/gpu/test_kernels_gpu.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch

from claa_sglang.forward.scorers import (
    FlashInferScorer,
    KernelRanker,
    KernelScorer,
    Look,
    Scored,
    SeveralScorers,
    TorchScorer,
    in_kernels,
    make_scorer,
)
from claa_sglang.kernels import fold, paged_lse, window_attention
from claa_sglang.ranking import rankers, spec
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState
from tests import interpreter
from tests.fast import states

HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 16, 60
CONFIG = msgspec.structs.replace(states.CONFIG, window=16)  # more than the paper's queries
NAMES = ["claa", "fastkv", "claa:zscore=off,heads=sum", "gemfilter", "last-query", "uniform", "claa:paper"]
WINDOW, PAPER, LAST = Look(16, peaks=True), Look(8, peaks=False), Look(1, peaks=False)
IN_KERNELS = {
    "claa": KernelRanker((WINDOW, LAST), 7, 0.02),
    "claa:carry=0": KernelRanker((WINDOW, LAST), 7, 0.0),
    "claa:last=off": KernelRanker((WINDOW,), 7, 0.02),
    "claa:last=off,carry=0": KernelRanker((WINDOW,), 7, 0.0),
    "claa:paper": KernelRanker((PAPER,), 7, 0.0),
    "claa:queries=sum,kernel=13": KernelRanker((PAPER,), 13, 0.02),
    "last-query": KernelRanker((LAST,), 7, 0.02),
    "last-query:carry=0.5": KernelRanker((LAST,), 7, 0.5),
}


def scored(request: int, ranker: str, explain: bool = False) -> Scored:
    state = RequestState.pruned_request(RequestOptions(ranker=ranker, explain=explain), CONFIG, TOKENS)
    return Scored(request, state, request * CONFIG.window, request, TOKENS)


def test_each_request_has_its_own_ranker() -> None:
    torch.manual_seed(0)
    table = torch.randperm(len(NAMES) * TOKENS).view(len(NAMES), TOKENS)
    requests = [scored(index, name, explain=True) for index, name in enumerate(NAMES)]
    scorer = make_scorer(requests, table, CONFIG)
    assert isinstance(scorer, TorchScorer)
    layers = [
        (torch.randn(len(NAMES) * CONFIG.window, HEADS, DIM), torch.randn(table.numel(), KV_HEADS, DIM))
        for _ in range(3)
    ]
    for queries, keys in layers:
        scorer.score(queries, keys, 0.3)
    for request, name in zip(requests, NAMES, strict=True):
        ranker = rankers.make(spec.parse(name), pool_kernel=CONFIG.pool_kernel)
        rows = slice(request.first_row, request.first_row + CONFIG.window)
        own = table[request.table_row]
        scores = [ranker.score_layer(q[rows], k[own], scaling=0.3) for q, k in layers]
        alone = [] if name == "uniform" else [ranker.rank([score]) for score in scores]
        found = scorer.layers(request.request)
        assert len(found) == len(alone) and all(map(torch.equal, found, alone)), name
        expected = ranker.rank(scores)
        assert torch.equal(scorer.ranking(request.request), expected), name
        assert request.state.progress.error is None


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_is_the_request_s_own(name: str) -> None:
    requests = [scored(0, name), scored(1, "claa")]
    scorer = make_scorer(requests, torch.arange(2 * TOKENS).view(2, TOKENS), CONFIG)
    scorer.score(torch.randn(2 * CONFIG.window, HEADS, DIM), torch.randn(2 * TOKENS, KV_HEADS, DIM), 1.0)
    scorer._scores[0] = []  # what no ranker can fold
    assert scorer.ranking(0).shape == (TOKENS - CONFIG.window,)
    assert requests[0].state.progress.error is not None
    scorer.ranking(1)
    assert requests[1].state.progress.error is None


@pytest.mark.parametrize("name", IN_KERNELS)
def test_what_the_kernels_have(name: str) -> None:
    assert in_kernels(spec.parse(name), CONFIG) == IN_KERNELS[name]


def test_a_window_below_the_paper_s_queries_bounds_them() -> None:
    small = msgspec.structs.replace(CONFIG, window=4)
    assert in_kernels(spec.parse("claa:paper"), small) == KernelRanker((Look(4, peaks=False),), 7, 0.0)
    assert in_kernels(spec.parse("claa"), small) == KernelRanker((Look(4, peaks=True), LAST), 7, 0.02)


@pytest.mark.parametrize(
    "name",
    ["fastkv", "gemfilter", "uniform", "claa:zscore=off", "claa:heads=sum", "claa:pool=after", "last-query:pool=after"],
)
def test_what_they_have_not_is_torch(name: str) -> None:
    assert in_kernels(spec.parse(name), CONFIG) is None


def test_the_kernels_rank_as_torch_does_each_ranker_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_attention, "window_mass", interpreter.load("window_attention").window_mass)
    monkeypatch.setattr(fold, "fold", interpreter.load("fold").fold)
    torch.manual_seed(1)
    names = [*IN_KERNELS, "fastkv", "claa"]
    table = torch.randperm(len(names) * TOKENS).view(len(names), TOKENS).int()
    asking = ("claa", "claa:paper")  # two that have a scorer together, and one alone
    requests = [scored(index, name, explain=name in asking) for index, name in enumerate(names)]
    groups = {name: [one for one, own in zip(requests, names, strict=True) if own == name] for name in names}
    assert [len(own) for own in groups.values()] == [2, *[1] * len(IN_KERNELS)]
    scorer = SeveralScorers(
        [
            (TorchScorer(own, table, CONFIG) if kernel is None else KernelScorer(own, table, CONFIG, kernel), own)
            for name, own in groups.items()
            for kernel in [in_kernels(spec.parse(name), CONFIG)]
        ]
    )
    torch_scorer = TorchScorer(requests, table, CONFIG)
    unasked = KernelScorer([scored(0, "claa"), scored(len(names) - 1, "claa")], table, CONFIG, IN_KERNELS["claa"])
    for _ in range(3):
        queries = 2 * torch.randn(len(names) * CONFIG.window, HEADS, DIM)
        keys = 2 * torch.randn(table.numel(), KV_HEADS, DIM)
        scorer.score(queries, keys, 0.25)
        torch_scorer.score(queries, keys, 0.25)
        unasked.score(queries, keys, 0.25)
    for index in (index for index, name in enumerate(names) if name in asking):
        layers = [torch.stack(of.layers(index)) for of in (scorer, torch_scorer)]
        assert layers[0].shape == (3, TOKENS - CONFIG.window)
        # Places of "claa" are of ranks: two rows as good as equal may have each other's.
        others = ~layers[0].isclose(layers[1], rtol=1e-4, atol=1e-4)
        assert others.sum() <= (0 if names[index] == "claa:paper" else 2)
    assert not unasked.layers(0) and torch.equal(unasked.ranking(0), scorer.ranking(0)), "asking changes no ranking"
    for index, name in enumerate(names):
        torch.testing.assert_close(scorer.ranking(index), torch_scorer.ranking(index), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("auto", {"claa": KernelScorer, "last-query": KernelScorer, "fastkv": TorchScorer}),
        ("triton", {"claa": KernelScorer, "last-query": KernelScorer, "fastkv": TorchScorer}),
        ("flashinfer", {"claa": FlashInferScorer, "last-query": FlashInferScorer, "fastkv": TorchScorer}),
        ("torch", {"claa": TorchScorer, "last-query": TorchScorer, "fastkv": TorchScorer}),
    ],
)
def test_which_scorer_there_is_on_a_gpu(name: Any, kinds: dict[str, type]) -> None:
    config = msgspec.structs.replace(CONFIG, scorer=name)
    table = cast(torch.Tensor, SimpleNamespace(is_cuda=True, device=torch.device("cpu")))
    for ranker, kind in kinds.items():
        assert type(make_scorer([scored(0, ranker)], table, config)) is kind
    several = make_scorer([scored(i, ranker) for i, ranker in enumerate(kinds)], table, config)
    if name != "torch":
        assert [type(one) for one in cast(SeveralScorers, several)._scorers] == list(kinds.values())


@pytest.mark.parametrize("name", ["auto", "triton", "flashinfer", "torch"])
def test_a_cpu_scores_in_torch(name: Any) -> None:
    config = msgspec.structs.replace(CONFIG, scorer=name)
    assert type(make_scorer([scored(0, "claa")], torch.zeros(1, TOKENS), config)) is TorchScorer


def test_flashinfer_is_planned_once_for_each_look_and_left_out_where_it_has_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans: list[dict] = []

    class Plan:
        def __init__(self, table: torch.Tensor, *lists: list[int], **of: Any) -> None:
            self.of = {**of, "lists": lists}
            plans.append(self.of)

        def __call__(self, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
            return torch.full((2, KV_HEADS, self.of["queries"] * HEADS // KV_HEADS), scaling)

    monkeypatch.setattr(paged_lse, "PagedLse", Plan)
    given: list[torch.Tensor | None] = []
    monkeypatch.setattr(window_attention, "window_mass", lambda *_, **of: given.append(of["lse"]))
    monkeypatch.setattr(fold, "fold", lambda *_, **__: None)
    requests, ranker = [scored(0, "claa"), scored(3, "claa")], in_kernels(spec.parse("claa"), CONFIG)
    assert ranker is not None
    keys = torch.zeros(9, KV_HEADS, 64, dtype=torch.bfloat16)
    table = torch.zeros(4, TOKENS, dtype=torch.int32)
    scorer = FlashInferScorer(requests, table, CONFIG, ranker)
    for _ in range(3):
        scorer.score(torch.zeros(64, HEADS, 64, dtype=torch.bfloat16), keys, 0.5)
    assert [plan["queries"] for plan in plans] == [16, 1]
    assert all(plan["lists"] == ([0, 48], [0, 3], [TOKENS, TOKENS]) and plan["heads"] == HEADS for plan in plans)
    assert [lse.shape[-1] for lse in given if lse is not None] == [32, 2] * 3
    given.clear()
    FlashInferScorer(requests, table, CONFIG, ranker).score(torch.zeros(64, HEADS, 64), keys.float(), 0.5)
    assert given == [None, None] and len(plans) == 2
    assert all(one.state.progress.error is None for one in requests)
