"""How decoder layers of SGLang 0.5.23 hand on the residual stream: one class for each way, listed in `CONVENTIONS`.

A model of any other kind is refused by name. Where a layer's arguments stand is known here alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream
from torch import Tensor


class UnsupportedModel(RuntimeError):
    """The model's layers follow no convention CLAA understands."""


class Convention(Protocol):
    """How a family calls its layers; `args` and `kwargs` are those of such a call, of the early layers' rows."""

    @classmethod
    def matches(cls, layer: Any, parameters: tuple[str, ...]) -> bool:
        """Whether `layer`, whose forward takes `parameters` (without self), is called in this way."""

    def positions(self, args: tuple, kwargs: dict) -> Tensor:
        """int64 `[rows]`: the positions of the rows."""

    def batch(self, args: tuple, kwargs: dict) -> Any:
        """SGLang's ForwardBatch."""

    def export(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        """(hidden, residual), each `[rows, H]`: what is to be added to the stream, and the stream."""

    def enter(self, hidden: Tensor, residual: Tensor, view: Any) -> Any:
        """What the first layer that runs on a view is handed."""

    def run(self, layer: Callable, positions: Tensor, handle: Any, view: Any) -> Any:
        """Call one layer on a view: what it hands on."""

    def leave(self, handle: Any, view: Any) -> tuple[Tensor, Tensor]:
        """(hidden, residual) after the last layer that runs on a view; sums that it left to others are complete."""

    def result(self, hidden: Tensor, residual: Tensor, batch: Any) -> Any:
        """What the last layer's call returns to the model's loop."""

    def passed(self, args: tuple, kwargs: dict) -> Any:
        """What a layer that did nothing returns: its own input."""


class StreamConvention:
    """`hidden = layer(positions, hidden, batch, …)`; the residual lives in `batch.residual_stream`."""

    @classmethod
    def matches(cls, layer: Any, parameters: tuple[str, ...]) -> bool:
        return parameters[:3] == ("positions", "hidden_states", "forward_batch") and hasattr(layer, "attn_boundary")

    def positions(self, args: tuple, kwargs: dict) -> Tensor:
        return args[0]

    def batch(self, args: tuple, kwargs: dict) -> Any:
        return args[2]

    def export(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        hidden, residual = residual_batch.stream_of(self.batch(args, kwargs)).export(self.passed(args, kwargs))
        return hidden, torch.zeros_like(hidden) if residual is None else residual

    def enter(self, hidden: Tensor, residual: Tensor, view: Any) -> Any:
        handle, view.residual_stream = ResidualStream.from_handoff(hidden, residual, PLAIN_ADD)
        return handle

    def run(self, layer: Callable, positions: Tensor, handle: Any, view: Any) -> Any:
        return layer(positions, handle, view)

    def leave(self, handle: Any, view: Any) -> tuple[Tensor, Tensor]:
        hidden, stream_residual = residual_batch.stream_of(view).export(handle)
        residual_batch.clear(view)
        return hidden, torch.zeros_like(hidden) if stream_residual is None else stream_residual

    def result(self, hidden: Tensor, residual: Tensor, batch: Any) -> Any:
        residual_batch.clear(batch)
        handle, batch.residual_stream = ResidualStream.from_handoff(hidden, residual, PLAIN_ADD)
        return handle

    def passed(self, args: tuple, kwargs: dict) -> Any:
        return args[1]


class ArgumentConvention:
    """`hidden, residual = layer(positions, hidden, batch, residual)`, the older convention."""

    @classmethod
    def matches(cls, layer: Any, parameters: tuple[str, ...]) -> bool:
        return parameters[:4] == ("positions", "hidden_states", "forward_batch", "residual")

    def positions(self, args: tuple, kwargs: dict) -> Tensor:
        return args[0]

    def batch(self, args: tuple, kwargs: dict) -> Any:
        return args[2]

    def export(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        hidden, residual = self.passed(args, kwargs)
        return hidden, torch.zeros_like(hidden) if residual is None else residual

    def enter(self, hidden: Tensor, residual: Tensor, view: Any) -> Any:
        return hidden, residual

    def run(self, layer: Callable, positions: Tensor, handle: Any, view: Any) -> Any:
        hidden, residual = handle
        return layer(positions, hidden, view, residual)

    def leave(self, handle: Any, view: Any) -> tuple[Tensor, Tensor]:
        return handle

    def result(self, hidden: Tensor, residual: Tensor, batch: Any) -> Any:
        return hidden, residual

    def passed(self, args: tuple, kwargs: dict) -> Any:
        return args[1], args[3] if len(args) > 3 else kwargs["residual"]


# A layer is of the first one that matches it.
CONVENTIONS: tuple[type[Convention], ...] = (ArgumentConvention, StreamConvention)


def convention_of(model: Any) -> tuple[Any, Convention]:
    """(decoder layers, convention) of a loaded model.

    Raises:
        UnsupportedModel: naming the class and what was found.
    """
    name = type(model).__name__
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise UnsupportedModel(f"{name}: its decoder layers are not at model.layers; {REMEDY}")
    found: set[type[Convention]] = set()
    for layer in layers:
        params = tuple(inspect.signature(type(layer).forward).parameters)[1:]
        matching = next((convention for convention in CONVENTIONS if convention.matches(layer, params)), None)
        if matching is None:
            raise UnsupportedModel(
                f"{name}: layer {type(layer).__name__}.forward({', '.join(params)}) hands on its residual in a way "
                f"CLAA does not know; {REMEDY}"
            )
        found.add(matching)
    if len(found) != 1:
        raise UnsupportedModel(f"{name}: its layers follow {len(found)} conventions; {REMEDY}")
    return layers, found.pop()()


REMEDY = "start the server without --enable-claa, or use a family named in docs/models.md"
