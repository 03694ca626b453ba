"""How long this process spent on CLAA before it could serve: what the plugin adds to a start, and on what."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_parts: dict[str, float] = {}
_inner: list[float] = []  # of each part that is open: seconds that parts inside it took


@contextmanager
def counted(part: str) -> Iterator[None]:
    """Count the time inside as `part`'s; what is counted as another part's inside it is not counted twice."""
    start = time.perf_counter()
    _inner.append(0.0)
    try:
        yield
    finally:
        spent = time.perf_counter() - start
        _parts[part] = _parts.get(part, 0.0) + spent - _inner.pop()
        if _inner:
            _inner[-1] += spent


def parts() -> dict[str, float]:
    """Seconds by part, so far in this process. Capturing decode graphs with a late child is not in it."""
    return {part: round(spent, 3) for part, spent in _parts.items()}


def seconds() -> float:
    """The sum of `parts`."""
    return round(sum(_parts.values()), 3)
