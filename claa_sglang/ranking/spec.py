"""How a ranker is written in a flag, a request or a report: `claa`, `claa:paper`, `fastkv`, `claa:carry=0.05,kernel=3`.

Text only: no torch, so that a configuration can be checked where there is none. `rankers.make` builds what is named.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, cast

_FOLD = ("zscore", "heads", "pool", "kernel", "carry")
# name -> the switches it takes; the class of that name in rankers.py has a field for each
SWITCHES: dict[str, tuple[str, ...]] = {
    "claa": (*_FOLD, "queries", "last"),
    "last-query": _FOLD,
    "fastkv": ("kernel",),
    "gemfilter": (),
    "uniform": (),
}
_VALUES: dict[str, tuple[str, ...]] = {
    "zscore": ("on", "off"),
    "heads": ("max", "sum"),
    "pool": ("before", "after"),
    "queries": ("max", "sum"),
    "last": ("on", "off"),
}
_NUMBERS = {"kernel": "K", "carry": "C"}
# A word that stands for several switches.
PAPER = "paper"
MAX_KERNEL = 1023
MAX_CARRY = 10.0
CARRY = 0.02  # docs/results/spans.md says why
_DECIMAL = re.compile(r"\d{1,3}(\.\d{1,9})?", re.ASCII)


def _help() -> str:
    takers: dict[tuple[str, ...], list[str]] = {}
    for name, switches in SWITCHES.items():
        takers.setdefault(switches, []).append(name)
    takes = []
    for switches, names in takers.items():
        written = [f"{switch}={'|'.join(_VALUES.get(switch, (_NUMBERS.get(switch, ''),)))}" for switch in switches]
        if written:
            takes.append(f"{' and '.join(names)} {'take' if len(names) > 1 else 'takes'} {', '.join(written)}")
    return (
        f"{', '.join(SWITCHES)}; {'; '.join(takes)} (K odd, in tokens; C from 0, which carries nothing, to "
        f"{MAX_CARRY:g}); switches come after a colon, as in claa:carry=0.05,kernel=13; claa:paper is "
        "claa:queries=sum,carry=0"
    )


HELP = _help()


class RankerError(ValueError):
    """No such ranker; the text lists what may be written."""


@dataclass(frozen=True, kw_only=True)
class RankerSpec:
    """One ranker by name, with its switches.

    Attributes:
        zscore, heads, pool, carry, queries, last: see `rankers.Claa`; left at their defaults by rankers without
            them. `claa` with queries "sum" and carry 0 is the paper's rule.
        kernel: positions averaged over, or None for the caller's own (the server's `--claa-pool-kernel`).
    """

    name: str = "claa"
    zscore: bool = True
    heads: Literal["max", "sum"] = "max"
    pool: Literal["before", "after"] = "before"
    kernel: int | None = None
    carry: float = CARRY
    queries: Literal["max", "sum"] = "max"
    last: bool = True

    def __str__(self) -> str:
        """The shortest text that `parse` reads back as this."""
        switches = []
        if self.queries == "sum" and not self.carry:
            switches.append(PAPER)
        else:
            if self.queries != "max":
                switches.append(f"queries={self.queries}")
            elif self.name == "claa" and not self.last:
                switches.append("last=off")
            if self.carry != CARRY:
                switches.append(f"carry={_decimal(self.carry)}")
        if not self.zscore:
            switches.append("zscore=off")
        if self.heads != "max":
            switches.append(f"heads={self.heads}")
        if self.pool != "before":
            switches.append(f"pool={self.pool}")
        if self.kernel is not None:
            switches.append(f"kernel={self.kernel}")
        return f"{self.name}:{','.join(switches)}" if switches else self.name


def _decimal(value: float) -> str:
    """At most nine places, as `parse` reads it."""
    return f"{value:.9f}".rstrip("0").rstrip(".")


def parse(text: str) -> RankerSpec:
    """Read `name` or `name:switch=value,...`. Raises RankerError, which lists names, switches or values."""
    name, colon, listed = text.partition(":")
    if name not in SWITCHES:
        raise RankerError(f"ranker {_short(text)}: no such name; give {HELP}")
    spec = RankerSpec(name=name)
    if not colon:
        return spec
    seen: set[str] = set()
    for switch, value in (pair for item in listed.split(",") for pair in _switches_of(item, name)):
        if switch not in SWITCHES[name]:
            takes = ", ".join(SWITCHES[name]) or "none: leave out the colon"
            raise RankerError(f"ranker {_short(text)}: no switch {_short(switch)}; {name} takes {takes}")
        if switch in seen:
            raise RankerError(f"ranker {_short(text)}: {switch} is given twice; give it once")
        seen.add(switch)
        spec = _with_switch(spec, switch, value, text)
    if spec.queries == "sum" and "last" in seen:
        raise RankerError(f"ranker {_short(text)}: last is a switch of queries=max; leave it out")
    return spec


def _switches_of(item: str, name: str) -> list[tuple[str, str]]:
    """Switches and values of one part of the text."""
    if item == PAPER and name == "claa":
        return [("queries", "sum"), ("carry", "0")]
    switch, _, value = item.partition("=")
    return [(switch, value)]


def _with_switch(spec: RankerSpec, switch: str, value: str, text: str) -> RankerSpec:
    if switch == "kernel":
        kernel = int(value) if value.isascii() and value.isdigit() and len(value) <= 4 else 0
        if kernel % 2 == 0 or kernel > MAX_KERNEL:
            raise RankerError(f"ranker {_short(text)}: kernel={_short(value)} must be odd, 1 to {MAX_KERNEL}")
        return replace(spec, kernel=kernel)
    if switch == "carry":
        carry = float(value) if _DECIMAL.fullmatch(value) else math.inf
        if carry > MAX_CARRY:
            raise RankerError(f"ranker {_short(text)}: carry={_short(value)} must be a number from 0 to {MAX_CARRY:g}")
        return replace(spec, carry=carry)
    if value not in _VALUES[switch]:
        raise RankerError(f"ranker {_short(text)}: {switch}={_short(value)} must be {' or '.join(_VALUES[switch])}")
    if switch == "zscore":
        return replace(spec, zscore=value == "on")
    if switch == "heads":
        return replace(spec, heads=cast(Literal["max", "sum"], value))
    if switch == "queries":
        return replace(spec, queries=cast(Literal["max", "sum"], value))
    if switch == "last":
        return replace(spec, last=value == "on")
    return replace(spec, pool=cast(Literal["before", "after"], value))


def _short(text: str) -> str:
    return ascii(text if len(text) <= 80 else f"{text[:80]}...")
