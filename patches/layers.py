"""Meet the calls of the late layers of the loaded model, and run each on the rows of the late pass.

Layers are met generically, before their own `__call__`, and no model's forward is copied. How they hand on the residual
stream is in `conventions.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import torch
from sglang.srt.model_executor.forward_context import forward_context, get_forward_context
from sglang.srt.runtime_context import get_parallel
from torch import Tensor
from torch.profiler import record_function

from claa_sglang.forward.late_pass import LatePass
from claa_sglang.forward.observe_pass import ObservePass
from claa_sglang.forward.stage_times import PRUNE
from claa_sglang.forward.warm_up import warm_up
from claa_sglang.memory.boundary import BoundaryStore
from claa_sglang.memory.kv_rows import move
from claa_sglang.patches import attached
from claa_sglang.patches.attention import ClaaAttnBackend
from claa_sglang.patches.conventions import REMEDY, Convention, UnsupportedModel, convention_of
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.policy import LivePolicy
from claa_sglang.patches.weights import say_profile
from claa_sglang.start import startup_time


class LateStack:
    """The late layers of one model, each run in its own turn of the model's loop, on the rows of the active late pass.

    The loop calls each decoder layer with the early layers' batch. A late layer's call is met before its module's own
    `__call__`: it takes the rows that the layer before it left here, runs the module on them, and hands the loop back
    what it came with. So whatever hangs on a layer (forward hooks, dumps) or asks which layer runs (recorders of the
    loop) sees that layer on its own rows, once.

    Args:
        backend: the composite backend, which holds the active pass.
        layers: every decoder layer.
        convention: how they hand on the residual stream.
        boundaries: per prune, the store of the states after it.
        buffers: K and V buffers of all layers.
    """

    def __init__(
        self,
        backend: ClaaAttnBackend,
        layers: Sequence[torch.nn.Module],
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
        self._first, self._last = self.prunes[0] + 1, len(layers) - 1
        self._forward: LateForward | None = None

    def wrap(self) -> None:
        """Meet the calls of every layer from now on. Raises UnsupportedModel for a late one whose calls cannot be."""
        for index in range(self._first, len(self._layers)):
            layer: Any = self._layers[index]
            if not _can_be_met(layer):
                raise UnsupportedModel(
                    f"calls of layer {index}, {type(layer).__name__}, do not go through torch.nn.Module alone: torch "
                    f"{torch.__version__} is not known, or something else (a compiler?) has taken them; {REMEDY}"
                )
            layer._compiled_call_impl = self._turn(index, layer._call_impl)
        for layer in self._layers[: self._first]:
            if _can_be_met(layer):
                layer._compiled_call_impl = self._early(layer._call_impl)

    def _early(self, stock: Callable) -> Callable:
        """What a call of an early layer does: as stock, but nothing in a forward whose late layers alone compute."""

        def call(*args: Any, **kwargs: Any) -> Any:
            late = self._backend.active
            if isinstance(late, LatePass) and late.plan.only_late:
                return self._convention.passed(args, kwargs)
            return stock(*args, **kwargs)

        return call

    def _turn(self, index: int, stock: Callable) -> Callable:
        """What a call of layer `index` does. stock: the call as it was, with the module's hooks."""

        def call(*args: Any, **kwargs: Any) -> Any:
            late = self._backend.active
            if isinstance(late, ObservePass):
                if index == self._first:  # every layer that ranks has run
                    with self._backend.stages.stage(PRUNE):
                        late.conclude()
                return stock(*args, **kwargs)
            if late is None:
                return stock(*args, **kwargs)
            if index == self._first:
                hidden, residual = self._convention.export(args, kwargs)
                self._forward = LateForward(late, hidden, residual, self._convention.positions(args, kwargs))
            forward = self._forward
            assert forward is not None
            if not isinstance(late, LatePass):
                self._run(index, forward, stock)  # capture: an error is SGLang's to report
            else:
                self._run_or_fail(index, forward, stock)
            if index < self._last:
                return self._convention.passed(args, kwargs)
            self._forward = None
            return self._convention.result(forward.hidden, forward.residual, self._convention.batch(args, kwargs))

        return call

    def _run_or_fail(self, index: int, forward: LateForward, stock: Callable) -> None:
        try:
            self._run(index, forward, stock)
        except Exception as error:
            if forward.failed or not forward.fails_everywhere(error):
                raise
            # The pruned requests of this batch end with it; its dense ones run on by themselves.
            forward.fail(error)
            if forward.late is not None:
                self._backend.active = forward.late  # attention must not score for those who are gone
            for before in range(self._first, index):
                self._run(before, forward, self._layers[before].forward)  # hooks have seen these rows
            self._run(index, forward, stock)

    def _run(self, index: int, forward: LateForward, layer: Callable) -> None:
        """The turn of layer `index`, and the prune before it or the way out after it. layer: called to compute it."""
        late = forward.late
        if late is None:
            return
        stores = index == self._first and not forward.failed
        prunes = index - 1 in self.prunes and late.has_late_rows
        if prunes:
            # All ranks, before anything that may fail on one of them: others would wait for it.
            late.merge_scores(self.prunes.index(index - 1))
        if stores or prunes:
            forward.by_itself(partial(self._move, index, forward, stores, prunes))
        if not late.has_late_rows:
            return
        view = forward.view
        if view is not None:
            forward.enter(self._convention)
            with forward_context(get_forward_context(), forward_batch=view):
                forward.handle = self._convention.run(layer, forward.positions, forward.handle, view)
        if index in self.prunes or index == self._last:
            forward.leave(self._convention)
        if index == self._last:
            with record_function("claa::leave"):
                forward.hidden, forward.residual = late.leave(forward.hidden, forward.residual)

    def _move(self, index: int, forward: LateForward, stores: bool, prunes: bool) -> None:
        """What comes before the turn of layer `index`, which every tensor-parallel rank does by itself."""
        if stores:
            with record_function("claa::store"):
                self._boundaries[0].store(*forward.late.boundary_rows(forward.hidden, forward.residual))
            for before, now in forward.late.last_tokens():
                for buffer in self._buffers:
                    move(buffer, before, now)
        if prunes:
            level = self.prunes.index(index - 1)
            with self._backend.stages.stage(PRUNE):
                forward.cross(level, self._boundaries[level])


class LateForward:
    """Where one forward is between two late layers.

    Args:
        late: the active pass.
        hidden, residual: `[rows of level 0, H]`, whose sum is the residual stream before the first late layer.
        positions: int64 `[rows of level 0]`.
    """

    def __init__(self, late: Any, hidden: Tensor, residual: Tensor, positions: Tensor) -> None:
        self.late = late  # None once nobody of the batch is left
        self.hidden, self.residual, self.positions = hidden, residual, positions
        self.view: Any = None  # of the level that runs; None while it has no rows
        self.handle: Any = None  # what the layers of a level hand on, between the first and the last of them
        self.failed = False
        self._agreed: Exception | None = None  # what all ranks failed with
        self._start = hidden, residual, positions

    def by_itself(self, work: Callable[[], None]) -> None:
        """Do what each tensor-parallel rank does by itself, before a layer in which all take part. Raises on every rank
        what it failed with, if it failed on any."""
        error: Exception | None = None
        try:
            work()
        except Exception as caught:  # noqa: BLE001
            error = caught
        try:
            self.late.agree_on_failures(error)
        except Exception as agreed:
            self._agreed = agreed
            raise

    def fails_everywhere(self, error: Exception) -> bool:
        """Whether every rank fails here, and so can go on with the dense requests. Else, in a layer, others wait for
        this rank in a reduction: nothing can go on."""
        return self.late is None or self.late.is_alone or error is self._agreed

    def cross(self, level: int, boundary: BoundaryStore) -> None:
        """Prune; see `LatePass.cross`."""
        self.hidden, self.residual, self.positions, self.view = self.late.cross(
            level, self.hidden, self.residual, self.positions, boundary
        )

    def enter(self, convention: Convention) -> None:
        """Before a layer: hand the rows to the layers of this level, where they are not there yet."""
        if self.handle is None:
            self.handle = convention.enter(self.hidden, self.residual, self.view)

    def leave(self, convention: Convention) -> None:
        """After the last layer of a level: take the rows back, complete on every rank."""
        if self.handle is not None:
            self.hidden, self.residual = convention.leave(self.handle, self.view)
            self.handle = None

    def fail(self, error: Exception) -> None:
        """End the batch's pruned requests, and go back to the first late layer with the dense ones."""
        self.failed = True
        for state in self.late.plan.pruned_states:
            state.progress.fail("running its late layers", error)
        self.late = self.late.without_pruned()
        self.hidden, self.residual, self.positions = self._start
        self.view = self.handle = None


def _can_be_met(layer: Any) -> bool:
    """Whether `layer(...)` asks `_compiled_call_impl` first, as torch.nn.Module does, and nobody else is there."""
    if layer._compiled_call_impl is not None:
        return False
    met: list[None] = []
    layer._compiled_call_impl = lambda: met
    try:
        return layer() is met
    except Exception:  # noqa: BLE001
        return False
    finally:
        layer._compiled_call_impl = None


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
        attached.policy.hang(self.req_to_token_pool, LivePolicy(self, layers[first], heads, config))
    with startup_time.counted("kernels"):
        keys = pool.get_key_buffer(config.steps[0].score_layers[0])
        choice = warm_up(keys, heads, self.dtype, backend.slots.table, boundaries, config)
    attached.scorer.hang(self.req_to_token_pool, choice)
    # From here on `auto` is what was chosen; the configuration that processes compare stays as it was given.
    backend.config = msgspec.structs.replace(config, scorer=choice.scorer)
    LateStack(backend, layers, convention, boundaries, buffers).wrap()
    with startup_time.counted("profile"):
        say_profile(self)


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
