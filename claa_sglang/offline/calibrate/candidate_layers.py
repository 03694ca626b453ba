"""Which prune layers a calibration tries: those that a server of the model in 16 bits, on one rank, takes.

In 32 bits a server may take a few more; more ranks of tensor parallelism may take fewer, and then refuse the profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from claa_sglang.config.state_room import Room
from claa_sglang.offline.calibrate.target import CalibrationError


def room_in_16_bits(config: Any) -> Room:
    """Where boundary states fit in KV rows. config: the text configuration of a transformers model."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Room(config.num_hidden_layers, config.hidden_size, layer_width=2 * kv_heads * head_dim, element_bytes=2)


def candidate_layers(asked: Sequence[int] | None, room: Room) -> range:
    """The layers between the two asked for, both included; by default from a quarter of the model on.

    Raises CalibrationError if there is none, or if a server would refuse one.
    """
    last_served = room.last_prune_layer
    if last_served < 0:
        raise CalibrationError(
            "this model's KV rows have no room for a token's state after any layer: nothing to choose"
        )
    first, last = asked or (min(room.num_layers // 4, last_served), last_served)
    if not 0 <= first <= last <= last_served:
        raise CalibrationError(
            f"--prune-layers {first} {last}: give two of 0 to {last_served}, the lower one first; after later ones KV "
            "rows of 16 bits have no room for a token's state, and a server refuses them"
        )
    return range(first, last + 1)
