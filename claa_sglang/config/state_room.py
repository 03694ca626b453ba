"""After which layers a slot's late-layer KV rows have room for the boundary state: host arithmetic alone.

The state of a token is a pair (hidden, residual) whose sum is the residual stream. Layers add the two in float32, so a
float32 sum in place of the pair changes nothing; a sum in 16 bits rounds what the next norm reads. Hence in 16 bits
there must be room for the pair, in 32 for the sum: a prune layer that would round is refused.
"""

from __future__ import annotations

from typing import NamedTuple

from claa_sglang.config.config import ClaaConfig, ConfigError


def state_width(hidden_size: int, element_bytes: int) -> int:
    """Elements that a boundary state needs at least. element_bytes: of a hidden state's and a KV row's elements."""
    return hidden_size if element_bytes >= 4 else 2 * hidden_size


class Room(NamedTuple):
    """What decides where the states of a model fit.

    num_layers: decoder layers. hidden_size: elements of a hidden state. layer_width: elements of K and V together that
    a slot has in one layer on one rank, as many as its bytes make of a hidden state's. element_bytes: of each element.
    """

    num_layers: int
    hidden_size: int
    layer_width: int
    element_bytes: int

    @property
    def last_prune_layer(self) -> int:
        """The last prune layer that leaves room for a state; negative if none does."""
        late_layers = -(-state_width(self.hidden_size, self.element_bytes) // self.layer_width)
        return self.num_layers - 1 - max(1, late_layers)

    def check(self, config: ClaaConfig, origin: str) -> None:
        """Raise ConfigError if a prune of `config` leaves too little room. origin: what gave its layers."""
        for step in config.steps:
            if step.prune_layer > self.last_prune_layer:
                raise ConfigError(f"{origin}: prune layer {step.prune_layer}: {self._why(step.prune_layer)}")

    def _why(self, prune_layer: int) -> str:
        after = self.num_layers - 1 - prune_layer
        last = self.last_prune_layer
        remedy = (
            f"Prune after layer {last} or an earlier one: 0 to {last} can be had of this model, in this dtype and at "
            "this tensor-parallel degree"
            if last >= 0
            else "No layer leaves more: use fewer tensor-parallel ranks, if there are several, or serve this model "
            "without --enable-claa"
        )
        return (
            f"a token's KV rows of the {after} layers after it hold {after * self.layer_width:,} elements of "
            f"{8 * self.element_bytes} bits on a rank, and the state that waits there for these layers has "
            f"{state_width(self.hidden_size, self.element_bytes):,}. {remedy}"
        )
