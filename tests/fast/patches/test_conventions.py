"""Families by how they call their layers: one class in one list each, and nothing else knows where arguments stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from claa_sglang.patches import conventions
from claa_sglang.patches.conventions import ArgumentConvention, StreamConvention, UnsupportedModel, convention_of
from claa_sglang.patches.layers import LateStack
from tests.fast.late_answers import check
from tests.fast.late_world import LAYERS, ONE_STEP, TWO_STEPS
from tests.fast.patches.test_late_stack import ModuleWorld, _in_a_forward, expected_rows  # noqa: F401


class OtherConvention:
    """`hidden, residual = layer(batch, stream=(hidden, residual), where=positions)`."""

    @classmethod
    def matches(cls, layer: Any, parameters: tuple[str, ...]) -> bool:
        return parameters == ("forward_batch", "stream", "where")

    def positions(self, args: tuple, kwargs: dict) -> Tensor:
        return kwargs["where"]

    def batch(self, args: tuple, kwargs: dict) -> Any:
        return args[0]

    def export(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        return kwargs["stream"]

    def enter(self, hidden: Tensor, residual: Tensor, view: Any) -> Any:
        return hidden, residual

    def run(self, layer: Any, positions: Tensor, handle: Any, view: Any) -> Any:
        return layer(view, stream=handle, where=positions)

    def leave(self, handle: Any, view: Any) -> tuple[Tensor, Tensor]:
        return handle

    def result(self, hidden: Tensor, residual: Tensor, batch: Any) -> Any:
        batch.ended = True
        return hidden, residual

    def passed(self, args: tuple, kwargs: dict) -> Any:
        return kwargs["stream"]


class OtherLayer(nn.Module):
    def __init__(self, world: OtherWorld, index: int) -> None:
        super().__init__()
        self._world, self._index = world, index

    def forward(self, forward_batch: Any, stream: tuple[Tensor, Tensor], where: Tensor) -> tuple[Tensor, Tensor]:
        return self._world.run(self._index, where, stream[0], forward_batch, stream[1])


class OtherWorld(ModuleWorld):
    """The world whose layers are called otherwise."""

    def __init__(self, steps: Any) -> None:
        super().__init__(steps)
        self.layers = nn.ModuleList(OtherLayer(self, i) for i in range(LAYERS))
        found, convention = convention_of(SimpleNamespace(model=SimpleNamespace(layers=self.layers)))
        LateStack(self.backend, list(found), convention, self.stores, []).wrap()  # type: ignore[arg-type]
        for i, layer in enumerate(self.layers):
            layer.register_forward_hook(lambda _m, _i, out, i=i: self.seen.append((i, out[0].shape[0])))

    def loop(self, batch: Any, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        self.seen, self.runs = [], []
        for index, layer in enumerate(self.layers):
            self.current = index
            hidden, residual = layer(batch, stream=(hidden, residual), where=batch.positions)
        assert batch.ended
        return hidden, residual


@pytest.mark.parametrize("steps", [ONE_STEP, TWO_STEPS], ids=["one-step", "two-steps"])
def test_a_family_with_other_arguments_is_one_class_in_the_list(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conventions, "CONVENTIONS", (*conventions.CONVENTIONS, OtherConvention))
    world = OtherWorld(steps)
    pruned, dense = world.add(text=1, prompt=20), world.add(text=2, prompt=12, pruned=False)
    world.extend([(pruned, 20), (dense, 12)])
    check(world, [pruned, dense])
    assert world.seen == world.runs == expected_rows(world)
    world.decode([pruned, dense])
    check(world, [pruned, dense])


class Streamed(nn.Module):
    attn_boundary = None

    def forward(self, positions: Any, hidden_states: Any, forward_batch: Any, **kwargs: Any) -> None: ...


class Handed(nn.Module):
    def forward(self, positions: Any, hidden_states: Any, forward_batch: Any, residual: Any) -> None: ...


class Unknown(nn.Module):
    def forward(self, hidden_states: Any) -> None: ...


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([Streamed(), Streamed()], StreamConvention),
        ([Handed()], ArgumentConvention),
        ([Streamed(), Handed()], "follow 2 conventions"),
        ([Handed(), Unknown()], r"Unknown\.forward\(hidden_states\) hands on its residual in a way"),
        ([], "follow 0 conventions"),
        (None, "not at model.layers"),
    ],
)
def test_a_model_is_known_by_all_of_its_layers(layers: list | None, found: Any) -> None:
    model = SimpleNamespace(model=SimpleNamespace(layers=layers))
    if isinstance(found, str):
        with pytest.raises(UnsupportedModel, match=found):
            convention_of(model)
    else:
        got, convention = convention_of(model)
        assert got is layers and type(convention) is found
