"""What the answer looked at, and how much of that was kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Shares = Sequence[float | None]


class Looked(NamedTuple):
    """A prompt token and its share of the answer's attention, the mean over the scored layers."""

    position: int
    share: float


def mean_of(layers: Mapping[str, Shares]) -> list[float]:
    """The mean over layers, of each prompt token; what has no value counts as 0."""
    rows = list(layers.values())
    return [sum(value or 0.0 for value in values) / len(rows) for values in zip(*rows, strict=True)]


def most(shares: Sequence[float], count: int, without: Iterable[int] = ()) -> list[Looked]:
    """The tokens that were looked at most, those of `without` left out, best first; of equal ones the first."""
    positions = set(range(len(shares))) - set(without)
    order = sorted(positions, key=lambda position: (-shares[position], position))
    return [Looked(position, shares[position]) for position in order[:count]]


def on_kept(shares: Shares, kept: Iterable[int], without: Iterable[int] = ()) -> float:
    """Of the attention on prompt tokens, those of `without` left out, the share on kept ones; NaN if there is none."""
    left_out = set(without)
    given = [0.0 if i in left_out else share or 0.0 for i, share in enumerate(shares)]
    total = sum(given)
    return sum(given[position] for position in kept) / total if total else float("nan")
