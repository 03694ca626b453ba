"""Ways in which blocks of queries read few earlier keys, by name: `4096`, or `2048:how=sum,samples=32`."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

How = Literal["max", "sum"]
Heads = Literal["each", "shared"]


class VariantError(ValueError):
    """A name that is none. The text says what may be written."""


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One way.

    Attributes:
        name: as it was written.
        budget: earlier tokens that a block reads beside itself, SINKS and LOCAL of `attention.py` among them.
        block: queries of a block, at multiples of it in the prompt.
        samples: queries of a block that choose.
        how: a token's score is the largest weight of any sample, or their sum, over the query heads of a KV head.
        heads: each KV head chooses its own tokens, or all of a layer share those of the largest score.
        layers: the layers that read so, as positions; None for all early ones.
    """

    name: str
    budget: int
    block: int = 2048
    samples: int = 64
    how: How = "max"
    heads: Heads = "each"
    layers: tuple[int, ...] | None = None


HELP = "BUDGET, or BUDGET:key=value,… with block, samples, how (max, sum), heads (each, shared), layers (such as 2-11)"


def parse(text: str) -> Variant:
    """The variant of this name. Raises VariantError."""
    budget, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    try:
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            if key in ("block", "samples"):
                values[key] = _number(value)
            elif key == "layers":
                first, _, last = value.partition("-")
                values[key] = tuple(range(int(first), int(last or first) + 1))
            elif (key, value) in [*(("how", one) for one in get_args(How)), *(("heads", x) for x in get_args(Heads))]:
                values[key] = value
            else:
                raise ValueError(part)
        return Variant(name=text, budget=_number(budget), **values)
    except ValueError as error:
        raise VariantError(f"{text}: not {HELP}") from error


def _number(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value
