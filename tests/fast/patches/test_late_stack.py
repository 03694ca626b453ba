"""Late layers in their own turns of a model's loop: what hangs on a layer sees it once, on its own rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_context import ForwardContext, set_forward_context
from torch import Tensor, nn

from claa_sglang.config.config import PruneStep
from claa_sglang.forward.batch_plan import BatchPlan
from claa_sglang.forward.late_pass import LatePass
from claa_sglang.forward.stage_times import StageTimes
from claa_sglang.patches.conventions import ArgumentConvention, UnsupportedModel
from claa_sglang.patches.layers import LateStack
from tests.fast.late_answers import check
from tests.fast.late_world import LAYERS, ONE_STEP, STRIDE, TWO_STEPS, Request, WatchedPass, World

STEPS = pytest.mark.parametrize("steps", [ONE_STEP, TWO_STEPS], ids=["one-step", "two-steps"])


class Layer(nn.Module):
    """A decoder layer of the world, called in SGLang's older convention."""

    def __init__(self, world: ModuleWorld, index: int) -> None:
        super().__init__()
        self._world, self._index = world, index

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: Any, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._world.run(self._index, positions, hidden_states, forward_batch, residual)


class ModuleWorld(World):
    """The world with its layers as modules, and a model's loop over them.

    seen: rows of every module's output, as a forward hook sees them: (layer, rows). runs: of layers run, the same.
    """

    def __init__(self, steps: tuple[PruneStep, ...]) -> None:
        super().__init__(steps)
        self.backend = SimpleNamespace(active=None, config=self.config, stages=StageTimes())
        self.layers = nn.ModuleList(Layer(self, i) for i in range(LAYERS))
        self.stack = LateStack(self.backend, list(self.layers), ArgumentConvention(), self.stores, [])  # type: ignore[arg-type]
        self.stack.wrap()
        self.seen: list[tuple[int, int]] = []
        self.runs: list[tuple[int, int]] = []
        self.fails: Callable[[int, Any], bool] = lambda layer, batch: False
        self.current = -1  # which layer the model's loop is at
        for i, layer in enumerate(self.layers):
            layer.register_forward_hook(lambda _m, _i, out, i=i: self.seen.append((i, out[0].shape[0])))

    def _batch(self, requests: list[Request], counts: list[int]) -> SimpleNamespace:
        batch = super()._batch(requests, counts)
        batch.moe_num_token_non_padded = None
        return batch

    def run(self, index: int, positions: Tensor, hidden: Tensor, batch: Any, residual: Tensor) -> tuple[Tensor, Tensor]:
        assert index == self.current or self.backend.active.plan is not self.last.plan  # recorders ask for it
        if self.fails(index, batch):
            raise RuntimeError("planted")
        self.runs.append((index, hidden.shape[0]))
        if self.backend.active is None:
            return hidden + 1, residual
        level = sum(index > step.prune_layer for step in self.config.steps)
        return self._layers(
            self.backend.active, level, range(index, index + 1), batch, hidden, residual, positions
        ), residual

    def loop(self, batch: Any, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """A model's forward over its layers."""
        self.seen, self.runs = [], []
        for index, layer in enumerate(self.layers):
            self.current = index
            hidden, residual = layer(batch.positions, hidden, batch, residual)
        return hidden, residual

    def _forward(self, plan: BatchPlan, batch: SimpleNamespace, requests: list[Request]) -> Tensor:
        self.prepared, self.rankings, self.read = [], [], defaultdict(dict)
        self.backend.active = self.last = WatchedPass(self, plan, batch)
        hidden = torch.stack((batch.texts, batch.positions, torch.zeros_like(batch.positions)), dim=1).float()
        hidden, residual = self.loop(batch, hidden, -hidden)
        assert torch.equal(residual[:, :2], -hidden[:, :2])
        return hidden


@pytest.fixture(autouse=True)
def _in_a_forward() -> Iterator[None]:
    before = set_forward_context(ForwardContext(attn_backend=None))  # type: ignore[arg-type]
    yield
    set_forward_context(before)


def expected_rows(world: ModuleWorld) -> list[tuple[int, int]]:
    plan = world.last.plan
    rows = [plan.rows(sum(i > step.prune_layer for step in world.config.steps)) for i in range(LAYERS)]
    return [(i, count) for i, count in enumerate(rows) if count]


@STEPS
def test_each_layer_is_seen_once_with_its_rows(steps: tuple[PruneStep, ...]) -> None:
    world = ModuleWorld(steps)
    pruned, dense = world.add(text=1, prompt=20), world.add(text=2, prompt=12, pruned=False)
    for chunks in ([(pruned, 12), (dense, 5)], [(pruned, 8), (dense, 7)]):
        out = world.extend(chunks)
        check(world, [pruned, dense])
        assert world.seen == world.runs == expected_rows(world)
    assert out[pruned][-1].tolist() == [1, 19, LAYERS]
    assert world.seen[-1] == (LAYERS - 1, pruned.state.plan.kept_counts[-1] + 7)
    world.decode([pruned, dense])
    check(world, [pruned, dense])
    assert world.seen == [(i, 2) for i in range(LAYERS)]


@STEPS
def test_layers_without_rows_are_not_seen(steps: tuple[PruneStep, ...]) -> None:
    world = ModuleWorld(steps)
    request = world.add(text=1, prompt=20)
    world.extend([(request, 12)])
    assert world.seen == world.runs == [(i, 12) for i in range(steps[0].prune_layer + 1)]


@STEPS
def test_a_late_prefill_in_parts(steps: tuple[PruneStep, ...]) -> None:
    world = ModuleWorld(steps)
    request = world.add(text=1, prompt=40, keep_rate=0.5)
    world.extend([(request, 40)], late_rows=8)
    while request.length < request.total:
        check(world, [request])
        assert world.seen == world.runs == expected_rows(world)
        world.extend([(request, 1)], late_rows=8)
    check(world, [request])


@STEPS
def test_a_batch_without_pruned_requests_is_the_stock_call(steps: tuple[PruneStep, ...]) -> None:
    world = ModuleWorld(steps)
    hidden, residual = torch.zeros(5, 3), torch.ones(5, 3)
    out, passed = world.loop(SimpleNamespace(positions=torch.arange(5)), hidden, residual)
    assert bool((out == LAYERS).all()) and passed is residual
    assert world.seen == world.runs == [(i, 5) for i in range(LAYERS)]


@STEPS
@pytest.mark.parametrize("failing", [3, 4, 5])
def test_after_a_failure_dense_rows_go_on_and_are_seen_once_more_at_most(
    steps: tuple[PruneStep, ...], failing: int
) -> None:
    world = ModuleWorld(steps)
    pruned, dense = world.add(text=1, prompt=20), world.add(text=2, prompt=12, pruned=False)

    def once(layer: int, batch: Any) -> bool:
        return layer == failing and any(row > STRIDE for row in batch.req_pool_indices.tolist())

    world.fails = once
    out = world.extend([(pruned, 20), (dense, 12)])
    assert "planted" in pruned.state.progress.error and dense.state.progress.error is None
    assert out[dense].tolist() == [[2, p, LAYERS] for p in range(12)]
    # Layers before the failure had been seen with these rows in them; from it on with dense rows alone.
    before = [(i, count) for i, count in expected_rows(world) if i < failing]
    assert world.seen == [*before, *((i, 12) for i in range(failing, LAYERS))]


class Met:
    """Two ranks, of which the other one does what this one does. fails: whether it fails at first. log: of calls."""

    size, checked = 2, False

    def __init__(self, fails: bool) -> None:
        self._fails = fails
        self.log: list[str] = []

    def gather(self, values: Tensor) -> list[Tensor]:
        self.log.append("gather")
        return [values, values]

    def any_of(self, flags: list[bool]) -> list[bool]:
        self.log.append("any_of")
        failed, self._fails = self._fails or flags[0], False
        return [failed, *flags[1:]]


def on_ranks(fails: bool = False) -> tuple[ModuleWorld, Request, Request]:
    world = ModuleWorld(ONE_STEP)
    world.ranks = Met(fails)  # type: ignore[assignment]
    return world, world.add(text=1, prompt=20), world.add(text=2, prompt=12, pruned=False)


@pytest.mark.parametrize("attribute", ["store", "load"])
def test_scores_are_exchanged_before_anything_that_may_fail(attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the other rank would wait for them, and this one for its failures."""
    world, pruned, dense = on_ranks()

    def fail(*args: Any) -> None:
        raise RuntimeError("planted")

    if attribute == "load":
        world.extend([(pruned, 12)])
    monkeypatch.setattr(world.stores[0], attribute, fail)
    out = world.extend([(pruned, pruned.total - pruned.length), (dense, 12)])
    assert world.ranks.log[-3:] == ["gather", "any_of", "any_of"]  # type: ignore[union-attr]
    assert "planted" in pruned.state.progress.error
    assert out[dense].tolist() == [[2, p, LAYERS] for p in range(12)]


def test_what_fails_on_the_other_rank_ends_the_pruned_requests_here() -> None:
    world, pruned, dense = on_ranks(fails=True)
    out = world.extend([(pruned, 20), (dense, 12)])
    assert "RankFailed" in pruned.state.progress.error and dense.state.progress.error is None
    assert out[dense].tolist() == [[2, p, LAYERS] for p in range(12)]


def test_a_failure_in_a_layer_of_several_ranks_is_sglangs() -> None:
    """The other ranks wait for this one in a reduction: nothing can go on."""
    world, pruned, dense = on_ranks()
    world.fails = lambda layer, batch: layer == 4
    with pytest.raises(RuntimeError, match="planted"):
        world.extend([(pruned, 20), (dense, 12)])
    assert pruned.state.progress.error is None


class Counted(nn.Module):
    """A decoder layer that adds 1, and counts its runs."""

    runs = 0

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: Any, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        self.runs += 1
        return hidden_states + 1, residual


def lends(borrowed: Tensor | None) -> Any:
    """A segment of a request with these borrowed slots."""
    return SimpleNamespace(state=SimpleNamespace(progress=SimpleNamespace(borrowed=borrowed)))


@pytest.mark.parametrize(
    ("segments", "rest"),
    [
        ([lends(torch.zeros(1))], True),
        ([lends(None)], False),
        ([lends(torch.zeros(1)), lends(None)], False),
        ([lends(torch.zeros(1)), SimpleNamespace(state=None)], False),
        (None, False),
    ],
    ids=["finishing", "pruned", "beside a pruned one", "beside a dense one", "no pruned ones"],
)
def test_early_layers_rest_in_a_step_of_finishing(segments: list[Any] | None, rest: bool) -> None:
    world = World(ONE_STEP)
    backend = SimpleNamespace(active=None, config=world.config, stages=StageTimes())
    layers = [Counted() for _ in range(LAYERS)]
    LateStack(backend, layers, ArgumentConvention(), world.stores, []).wrap()  # type: ignore[arg-type]
    if segments is not None:
        backend.active = LatePass.__new__(LatePass)
        backend.active.plan = BatchPlan((tuple(segments),), decode=False)
    hidden, residual = torch.zeros(1, 4), None
    for layer in layers[: ONE_STEP[0].prune_layer + 1]:
        hidden, residual = layer(torch.zeros(1), hidden, None, residual)
    early = ONE_STEP[0].prune_layer + 1
    assert [layer.runs for layer in layers[:early]] == [0 if rest else 1] * early
    assert hidden.unique().tolist() == [0.0 if rest else float(early)]


def test_a_failure_of_dense_rows_is_sglangs() -> None:
    world = ModuleWorld(ONE_STEP)
    pruned, dense = world.add(text=1, prompt=20), world.add(text=2, prompt=12, pruned=False)
    world.fails = lambda layer, batch: layer == 4
    with pytest.raises(RuntimeError, match="planted"):
        world.extend([(pruned, 20), (dense, 12)])


def test_layers_whose_calls_go_elsewhere_are_refused() -> None:
    class Called(Layer):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

    world = ModuleWorld(ONE_STEP)
    for layer in (Called(world, 4), world.layers[4]):  # the second one's calls are met already
        layers = [*world.layers[:4], layer, world.layers[5]]
        layers[3]._compiled_call_impl = None
        with pytest.raises(UnsupportedModel, match="calls of layer 4, (Called|Layer), do not go"):
            LateStack(world.backend, layers, ArgumentConvention(), world.stores, []).wrap()  # type: ignore[arg-type]
