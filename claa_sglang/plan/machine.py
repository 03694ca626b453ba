"""The record of a machine: a JSON file that `claa-sglang plan --measure` writes. Two are shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from claa_sglang.config.config import short
from claa_sglang.plan.error import PlanError
from claa_sglang.policy.cost import Constants
from claa_sglang.policy.rates import Layer, Rates, constants

SHIPPED = Path(__file__).parent / "machines"
Dtype = Literal["bfloat16", "float16", "float32"]
ITEMSIZE: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
Positive = Annotated[float, Meta(gt=0, le=1e30)]
Seconds = Annotated[float, Meta(ge=0, le=1e3)]


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine, by what it does with numbers of one type.

    device: its name. dtype: of weights and KV. matmul, attention: FLOP per second. bandwidth: bytes per second of its
    memory. request: seconds that a request pays once, outside of layers. graph_layer, eager_layer: seconds that the
    host takes to launch one layer in a CUDA graph, or kernel by kernel. prune: seconds of a prune that no layer has in
    it. overlaps: whether the device computes while the host launches. memory: bytes, None where it is not known.
    head_dim: elements of a head, at which attention was measured. source: where the numbers come from. date: when, if
    measured. checked: how far predictions by this record were off, where they were held against measured times.
    """

    device: str
    dtype: Dtype
    matmul: Positive
    attention: Positive
    bandwidth: Positive
    request: Seconds
    graph_layer: Seconds
    eager_layer: Seconds
    prune: Seconds = 0.0
    overlaps: bool
    memory: Annotated[int, Meta(ge=1)] | None = None
    head_dim: Annotated[int, Meta(ge=1)]
    source: str = ""
    date: str = ""
    checked: tuple[str, ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]

    def constants(self, layer: Layer) -> Constants:
        """Of what the device computes; launching is the host's, and reckoned apart."""
        return constants(Rates(self.matmul, self.attention, self.bandwidth), layer)

    def to_json(self) -> str:
        """As a file has it."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"


def shipped() -> tuple[str, ...]:
    """Names of the records that come with the package."""
    return tuple(sorted(file.stem for file in SHIPPED.glob("*.json")))


def load(named: str) -> Machine:
    """A record: of a file, or a shipped one by its name. Raises PlanError."""
    file = SHIPPED / f"{named}.json" if named in shipped() else Path(named)
    try:
        return msgspec.json.decode(file.read_bytes(), type=Machine)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else short(error)
        raise PlanError(f"--machine {short(named)}: {why}. {REMEDY}") from error


REMEDY = f"Give {' or '.join(shipped())}, or make a record of this machine: claa-sglang plan --measure --out FILE"
