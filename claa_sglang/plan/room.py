"""KV slots and bytes of a request, and how many requests a server has room for: as `memory/` takes them."""

from __future__ import annotations

from typing import NamedTuple

from claa_sglang.config.budget import kept_count
from claa_sglang.config.state_room import Room
from claa_sglang.plan.machine import Machine
from claa_sglang.plan.model import Shape
from claa_sglang.plan.predict import Prune


class Need(NamedTuple):
    """Of one request with its answer. late: KV slots for what is kept, on top. slots: all of them. bytes: of these."""

    late: int
    slots: int
    bytes: int


def slot_bytes(shape: Shape, itemsize: int) -> int:
    """Bytes of a KV slot: K and V of one token in every layer."""
    return shape.layers * shape.kv_width * itemsize


def need(shape: Shape, itemsize: int, prompt: int, answer: int, prune: Prune | None = None) -> Need:
    """Slots of a request of `prompt` tokens that generates `answer`.

    A late slot is a slot of the same pool, for kept and for generated tokens; so a pruned request takes more. States
    at the prune wait in rows of early slots, and take none.
    """
    late = 0 if prune is None else kept_count(prompt, prune.keep_rate, prune.window) + answer
    slots = prompt + answer + late
    return Need(late, slots, slots * slot_bytes(shape, itemsize))


def pool_slots(shape: Shape, machine: Machine, fraction: float) -> int | None:
    """KV slots of a server to which weights and KV are `fraction` of the machine's memory; None if it is not known.
    Zero where the weights alone take more."""
    if machine.memory is None:
        return None
    left = machine.memory * fraction - shape.weights * machine.itemsize
    return max(0, int(left // slot_bytes(shape, machine.itemsize)))


def last_prune_layer(shape: Shape, itemsize: int) -> int:
    """The last layer after which a slot's late-layer rows hold a token's state; negative if none."""
    return Room(shape.layers, shape.hidden, shape.kv_width, itemsize).last_prune_layer
