"""How a ranker is written in a flag, a request or a report: `claa`, `fastkv`, `claa:zscore=off,heads=sum`.

Text only: no torch, so that a configuration can be checked where there is none. `rankers.make` builds what is named.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

_FOLD = ("zscore", "heads", "pool", "kernel")
# name -> the switches it takes
SWITCHES: dict[str, tuple[str, ...]] = {
    "claa": _FOLD,
    "last-query": _FOLD,
    "fastkv": ("kernel",),
    "gemfilter": (),
    "uniform": (),
}
_VALUES: dict[str, tuple[str, ...]] = {"zscore": ("on", "off"), "heads": ("max", "sum"), "pool": ("before", "after")}
MAX_KERNEL = 1023

HELP = (
    f"{', '.join(SWITCHES)}; claa and last-query take switches after a colon, as in claa:zscore=off,heads=sum: "
    "zscore=on|off, heads=max|sum, pool=before|after, kernel=K (odd, in tokens); fastkv takes kernel=K"
)


class RankerError(ValueError):
    """No such ranker; the text lists what may be written."""


@dataclass(frozen=True, kw_only=True)
class RankerSpec:
    """One ranker by name, with its switches; the default is CLAA as the paper has it.

    Attributes:
        zscore, heads, pool: see `rankers.Claa`; left at their defaults by rankers that do not take them.
        kernel: positions averaged over, or None for the caller's own (the server's `--claa-pool-kernel`).
    """

    name: str = "claa"
    zscore: bool = True
    heads: Literal["max", "sum"] = "max"
    pool: Literal["before", "after"] = "before"
    kernel: int | None = None

    def __str__(self) -> str:
        """The shortest text that `parse` reads back as this."""
        switches = []
        if not self.zscore:
            switches.append("zscore=off")
        if self.heads != "max":
            switches.append(f"heads={self.heads}")
        if self.pool != "before":
            switches.append(f"pool={self.pool}")
        if self.kernel is not None:
            switches.append(f"kernel={self.kernel}")
        return f"{self.name}:{','.join(switches)}" if switches else self.name


def parse(text: str) -> RankerSpec:
    """Read `name` or `name:switch=value,...`. Raises RankerError, which lists names, switches or values."""
    name, colon, listed = text.partition(":")
    if name not in SWITCHES:
        raise RankerError(f"ranker {_short(text)}: no such name; give {HELP}")
    spec = RankerSpec(name=name)
    if not colon:
        return spec
    seen: set[str] = set()
    for item in listed.split(","):
        switch, _, value = item.partition("=")
        if switch not in SWITCHES[name]:
            takes = ", ".join(SWITCHES[name]) or "none: leave out the colon"
            raise RankerError(f"ranker {_short(text)}: no switch {_short(switch)}; {name} takes {takes}")
        if switch in seen:
            raise RankerError(f"ranker {_short(text)}: {switch} is given twice; give it once")
        seen.add(switch)
        spec = _with_switch(spec, switch, value, text)
    return spec


def _with_switch(spec: RankerSpec, switch: str, value: str, text: str) -> RankerSpec:
    if switch == "kernel":
        kernel = int(value) if value.isascii() and value.isdigit() and len(value) <= 4 else 0
        if kernel % 2 == 0 or kernel > MAX_KERNEL:
            raise RankerError(f"ranker {_short(text)}: kernel={_short(value)} must be odd, 1 to {MAX_KERNEL}")
        return replace(spec, kernel=kernel)
    if value not in _VALUES[switch]:
        raise RankerError(f"ranker {_short(text)}: {switch}={_short(value)} must be {' or '.join(_VALUES[switch])}")
    if switch == "zscore":
        return replace(spec, zscore=value == "on")
    if switch == "heads":
        return replace(spec, heads=cast(Literal["max", "sum"], value))
    return replace(spec, pool=cast(Literal["before", "after"], value))


def _short(text: str) -> str:
    return ascii(text if len(text) <= 80 else f"{text[:80]}...")
