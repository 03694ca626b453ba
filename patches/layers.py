"""Wrap the late layers of the loaded model: all of them run inside the wrapper of the first one.

Layers are wrapped generically, by instance attribute, and no model's forward is copied. Two conventions of SGLang
0.5.23 are understood; a model of any other kind is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream
from sglang.srt.model_executor.forward_context import forward_context, get_forward_context
from sglang.srt.runtime_context import get_parallel
from torch import Tensor
from torch.profiler import record_function

from claa_sglang import startup_time
from claa_sglang.forward.graph_decode import DecodeGraphPass
from claa_sglang.forward.warm_up import warm_up
from claa_sglang.memory.boundary import BoundaryStore
from claa_sglang.patches.attention import ClaaAttnBackend
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.policy import LivePolicy


class UnsupportedModel(RuntimeError):
    """The model's layers follow no convention CLAA understands."""


class Convention(Protocol):
    """How a family hands the residual stream from layer to layer."""

    def export(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        """(hidden, residual) of a layer call: what is to be added to the stream, and the stream."""

    def run(
        self, layer: Callable, positions: Tensor, hidden: Tensor, residual: Tensor, view: Any
    ) -> tuple[Tensor, Tensor]:
        """Call one layer on a view."""

    def result(self, hidden: Tensor, residual: Tensor, batch: Any) -> Any:
        """What the last layer's call returns to the model's loop."""

    def passed(self, args: tuple, kwargs: dict) -> Any:
        """What a layer that did nothing returns: its own input."""


class StreamConvention:
    """`hidden = layer(positions, hidden, batch, …)`; the residual lives in `batch.residual_stream`."""

    def export(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        hidden, batch = args[1], args[2]
        hidden, residual = residual_batch.stream_of(batch).export(hidden)
        return hidden, torch.zeros_like(hidden) if residual is None else residual

    def run(
        self, layer: Callable, positions: Tensor, hidden: Tensor, residual: Tensor, view: Any
    ) -> tuple[Tensor, Tensor]:
        handle, view.residual_stream = ResidualStream.from_handoff(hidden, residual, PLAIN_ADD)
        handle = layer(positions, handle, view)
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

    def export(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        hidden, residual = self.passed(args, kwargs)
        return hidden, torch.zeros_like(hidden) if residual is None else residual

    def run(
        self, layer: Callable, positions: Tensor, hidden: Tensor, residual: Tensor, view: Any
    ) -> tuple[Tensor, Tensor]:
        return layer(positions, hidden, view, residual)

    def result(self, hidden: Tensor, residual: Tensor, batch: Any) -> Any:
        return hidden, residual

    def passed(self, args: tuple, kwargs: dict) -> Any:
        return args[1], args[3] if len(args) > 3 else kwargs["residual"]


def convention_of(model: Any) -> tuple[Any, Convention]:
    """(decoder layers, convention) of a loaded model.

    Raises:
        UnsupportedModel: naming the class and what was found.
    """
    name = type(model).__name__
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise UnsupportedModel(f"{name}: its decoder layers are not at model.layers; {_REMEDY}")
    found: set[type[Convention]] = set()
    for layer in layers:
        params = tuple(inspect.signature(type(layer).forward).parameters)[1:]
        if params[:4] == ("positions", "hidden_states", "forward_batch", "residual"):
            found.add(ArgumentConvention)
        elif params[:3] == ("positions", "hidden_states", "forward_batch") and hasattr(layer, "attn_boundary"):
            found.add(StreamConvention)
        else:
            raise UnsupportedModel(
                f"{name}: layer {type(layer).__name__}.forward({', '.join(params)}) hands on its residual in a way "
                f"CLAA does not know; {_REMEDY}"
            )
    if len(found) != 1:
        raise UnsupportedModel(f"{name}: its layers follow {len(found)} conventions; {_REMEDY}")
    return layers, found.pop()()


_REMEDY = "start the server without --enable-claa, or use a family named in docs/models.md"


class LateStack:
    """The late layers of one model, run on the rows of the active late pass.

    Args:
        backend: the composite backend, which holds the active pass.
        layers: the `forward` of every layer, unwrapped.
        convention: how they hand on the residual stream.
        boundaries: per prune, the store of the states after it.
        buffers: K and V buffers of all layers.
    """

    def __init__(
        self,
        backend: ClaaAttnBackend,
        layers: list[Callable],
        convention: Convention,
        boundaries: list[BoundaryStore],
        buffers: list[Tensor],
    ) -> None:
        self._backend = backend
        self._layers = layers
        self._convention = convention
        self._boundaries = boundaries
        self._buffers = buffers
        self.prunes = [step.prune_layer for step in backend.config.steps]

    def first(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the first late layer: runs all late layers when the batch has pruned requests."""
        late = self._backend.active
        if late is None:
            return self._layers[self.prunes[0] + 1](*args, **kwargs)
        positions, batch = args[0], args[2]
        hidden, residual = self._convention.export(args, kwargs)
        if isinstance(late, DecodeGraphPass):  # capture: an error is SGLang's to report
            self._boundaries[0].store(*late.boundary_rows(hidden, residual))
            return self._convention.result(*self._run(late, hidden, residual, positions), batch)
        try:
            with record_function("claa::store"):
                self._boundaries[0].store(*late.boundary_rows(hidden, residual))
            for before, now in late.last_tokens():
                for buffer in self._buffers:
                    buffer.index_copy_(0, now, buffer.index_select(0, before))
            out = self._run(late, hidden, residual, positions) if late.has_late_rows else (hidden, residual)
        except Exception as error:
            # The pruned requests of this batch end with it; its dense ones run on by themselves.
            for state in late.plan.pruned_states:
                state.fail("running its late layers", error)
            rest = late.without_pruned()
            out = (hidden, residual) if rest is None else self._run(rest, hidden, residual, positions)
        return self._convention.result(*out, batch)

    def _run(self, late: Any, hidden: Tensor, residual: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        ends = [*self.prunes[1:], len(self._layers) - 1]
        for level, (prune, end) in enumerate(zip(self.prunes, ends, strict=True)):
            with record_function("claa::prune"):
                hidden, residual, positions, view = late.cross(
                    level, hidden, residual, positions, self._boundaries[level]
                )
            if view is None:
                continue
            with forward_context(get_forward_context(), forward_batch=view):
                for i in range(prune + 1, end + 1):
                    hidden, residual = self._convention.run(self._layers[i], positions, hidden, residual, view)
        with record_function("claa::leave"):
            return late.leave(hidden, residual)

    def other(self, index: int) -> Callable:
        """The forward of a later layer: nothing, when the first late layer's wrapper has run it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._backend.active is None:
                return self._layers[index](*args, **kwargs)
            return self._convention.passed(args, kwargs)

        return forward


def wrap_late_layers(result: Any, self: Any) -> Any:
    """AFTER `ModelRunner.init_attention_backends`: wrap the late layers of the loaded model."""
    with startup_time.counted("layers"):
        _wrap(self)
    return result


def _wrap(self: Any) -> None:
    backend = self.attn_backend
    layers, convention = convention_of(self.model)
    config = backend.config
    if len(layers) != config.num_layers:
        raise UnsupportedModel(
            f"{type(self.model).__name__} has {len(layers)} layers here, its configuration says {config.num_layers}"
        )
    pool = self.token_to_kv_pool
    first = config.steps[0].prune_layer + 1
    buffers = [b for i in range(len(layers)) for b in (pool.get_key_buffer(i), pool.get_value_buffer(i))]
    boundaries = [
        BoundaryStore(buffers[2 * (step.prune_layer + 1) :], self.model_config.hidden_size, self.dtype)
        for step in config.steps
    ]
    heads = self.model_config.num_attention_heads // get_parallel().attn_tp_group.world_size
    with startup_time.counted("cost measurement"):
        self.req_to_token_pool.claa_policy = LivePolicy(self, layers[first], heads, config)
    with startup_time.counted("kernels"):
        warm_up(pool.get_key_buffer(config.steps[0].score_layers[0]), heads, backend.slots.table, boundaries, config)
    stack = LateStack(backend, [layer.forward for layer in layers], convention, boundaries, buffers)
    layers[first].forward = stack.first
    for i in range(first + 1, len(layers)):
        layers[i].forward = stack.other(i)


HOOKS = (
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends",
        ("self",),
        "after",
        wrap_late_layers,
        "scheduler",
        "The model is loaded and the backends exist: the late layers can be wrapped, before any graph is captured.",
    ),
)
