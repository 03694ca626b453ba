"""How long this process spent on CLAA before it could serve: what the plugin adds to a start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_spent = 0.0
_depth = 0


@contextmanager
def counted() -> Iterator[None]:
    """Count the time inside; of nested ones, the outermost."""
    global _spent, _depth
    start = time.perf_counter()
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _spent += time.perf_counter() - start


def seconds() -> float:
    """Counted so far in this process. Capturing decode graphs with a late child is not in it: SGLang's own time."""
    return round(_spent, 3)
