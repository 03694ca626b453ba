"""One forward of a server that observes: what would be kept is what `select` keeps; what fails is a line of the log."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from claa_sglang.config.config import ClaaConfig
from claa_sglang.forward import observe_pass
from claa_sglang.forward.batch_plan import Segment
from claa_sglang.forward.observe_pass import ObservePass
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState
from tests.fast.states import CONFIG

ONE = msgspec.structs.replace(CONFIG, steps=CONFIG.steps[:1], window=4)


class FakeScores:
    """Ranks later tokens higher; fails where it is told to."""

    def __init__(self, scored: list[Any], fails: str = "") -> None:
        self.scored, self.fails, self.layers = scored, fails, 0

    def score(self, queries: Any, keys: Any, scaling: float) -> None:
        self.layers += 1
        if self.fails == "all":
            raise RuntimeError("no scores")
        if self.fails == "one":
            self.scored[0].state.progress.fail("scoring its prompt", RuntimeError("its scores"))

    def ranking(self, request: int) -> torch.Tensor:
        if self.fails == "ranking":
            raise RuntimeError("no ranking")
        (tokens,) = (s.tokens for s in self.scored if s.request == request)
        return torch.arange(tokens - ONE.window, dtype=torch.float32)


def segments(*prompts: int, rate: float = 0.5) -> list[Segment]:
    found, start = [], 0
    for i, tokens in enumerate(prompts):
        state = RequestState.observed_request(RequestOptions(keep_rate=rate), ONE, tokens)
        found.append(Segment(i, start, start + tokens, i, 0, tokens, state, True))
        start += tokens
    return found


def observe(found: list[Segment], monkeypatch: Any, fails: str = "", config: ClaaConfig = ONE) -> ObservePass:
    monkeypatch.setattr(observe_pass, "make_scorer", lambda scored, *_: FakeScores(scored, fails))
    made = ObservePass(found, torch.zeros(4, 100, dtype=torch.int32), config)
    for layer in range(config.num_layers):
        if layer == config.steps[0].prune_layer + 1:
            made.conclude()
        if made.needs_scores(0, layer):
            made.score(0, torch.zeros(1), torch.zeros(1), 1.0)
    made.conclude()
    return made


def kept(segment: Segment) -> list[int] | None:
    assert segment.state is not None
    found = segment.state.progress.kept[0]
    return None if found is None else found.tolist()


def test_what_would_be_kept(monkeypatch: Any) -> None:
    """The first token, the highest ranks and the window, of each request by itself."""
    found = segments(20, 30)
    observe(found, monkeypatch)
    assert kept(found[0]) == [0, *range(11, 20)]
    assert kept(found[1]) == [0, *range(16, 30)]
    assert all(s.state is not None and s.state.progress.error is None for s in found)


def test_a_request_that_keeps_everything_is_not_scored(monkeypatch: Any) -> None:
    found = segments(20, rate=1.0)
    made = ObservePass(found, torch.zeros(1, 100), ONE)
    assert not any(made.needs_scores(0, layer) for layer in range(ONE.num_layers))
    assert kept(found[0]) == list(range(20))


@pytest.mark.parametrize(("fails", "left"), [("all", [None, None]), ("ranking", [None, None]), ("one", [None, 15])])
def test_what_fails_ends_no_request(fails: str, left: list[int | None], monkeypatch: Any, caplog: Any) -> None:
    found = segments(20, 30)
    observe(found, monkeypatch, fails)
    assert [None if (k := kept(s)) is None else len(k) for s in found] == left
    assert all(s.state is not None and s.state.progress.error is None for s in found)
    assert caplog.records
