"""Which rankers a calibration tries. No torch here: the command line reads its defaults.

A ranker's *family* is the ranker without its carry. Its score of a token is then the largest of each layer's own, so a
family's layers are folded once for all sets of layers and all carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from claa_sglang.offline.calibrate.target import CalibrationError
from claa_sglang.ranking.spec import RankerSpec, parse

POOL_KERNEL = 7  # of a ranker that names none: the server's default
# Of equally good ones the first is taken, so what a server does by default comes first. What they differ in: how far a
# strong token carries, the width of the pool, and which queries are asked (any of the window's, the last beside them or
# alone, a sum).
RANKERS = (
    "claa",
    "claa:carry=0.01",
    "claa:carry=0.05",
    "claa:last=off",
    "claa:kernel=13",
    "claa:carry=0.05,kernel=13",
    "last-query",
    "claa:paper",
)
_FOLDED = ("claa", "last-query")


def read(texts: Sequence[str]) -> tuple[RankerSpec, ...]:
    """The rankers of `--rankers`, each once. Raises RankerError for a text that is none.

    Raises CalibrationError for one whose layers cannot be scored apart: a search of layers would have to begin again
    for every set.
    """
    found: dict[RankerSpec, None] = {}
    for text in texts:
        spec = parse(text)
        if spec.name not in _FOLDED or spec.pool == "after":
            raise CalibrationError(
                f"--rankers {text}: layers can be chosen for {' and '.join(_FOLDED)}, without pool=after; leave it out"
            )
        found[replace(spec, kernel=None) if spec.kernel == POOL_KERNEL else spec] = None
    return tuple(found)


def family(spec: RankerSpec) -> RankerSpec:
    """The ranker before anything is carried."""
    return replace(spec, carry=0.0)
