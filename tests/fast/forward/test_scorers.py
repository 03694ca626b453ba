"""Which scorer a batch gets, and that each request is ranked by its own ranker."""

from __future__ import annotations

import pytest
import torch

from claa_sglang.forward.scorers import Scored, TorchScorer, make_scorer
from claa_sglang.ranking import rankers, spec
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState
from tests.fast.states import CONFIG

HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 8, 60
NAMES = ["claa", "fastkv", "claa:zscore=off,heads=sum", "gemfilter", "last-query", "uniform"]


def scored(request: int, ranker: str) -> Scored:
    state = RequestState.pruned_request(RequestOptions(ranker=ranker), CONFIG, TOKENS)
    return Scored(request, state, request * CONFIG.window, request, TOKENS)


def test_each_request_has_its_own_ranker() -> None:
    torch.manual_seed(0)
    table = torch.randperm(len(NAMES) * TOKENS).view(len(NAMES), TOKENS)
    requests = [scored(index, name) for index, name in enumerate(NAMES)]
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
        expected = ranker.rank([ranker.score_layer(q[rows], k[own], scaling=0.3) for q, k in layers])
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
