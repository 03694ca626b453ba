"""Faults planted in a server's processes: functions that raise while a file names them.

Imported there by a second plugin (`engine_server.second_plugin`). The file is named in the environment, and says
`NAME`, or `NAME,RANK` for one tensor-parallel rank alone; while it is empty nothing fails. SGLang and what is planted
in are imported in the server only.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "CLAA_TEST_FAULT"  # environment variable

# What a request ends with, by the name of the fault.
IN_A_FORWARD = {
    "scoring": "scoring its prompt",
    "ranking": "ranking its prompt",
    "storing": "running its late layers",
    "storing one": "running its late layers",
    "late pass": "running its late layers",
    "decoding": "running its late layers",
}


def is_on(name: str) -> bool:
    """Whether the file names this fault, and this rank if it names one."""
    named, _, rank = Path(os.environ[FILE]).read_text().partition(",")
    if named != name:
        return False
    if not rank:
        return True
    from sglang.srt.runtime_context import get_parallel

    return int(rank) == get_parallel().tp_rank


def plant(name: str, owner: Any, attribute: str, applies: Callable[..., bool] = lambda *args: True) -> None:
    """Let this function raise while the fault is on, in calls whose arguments `applies` takes."""
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if is_on(name) and applies(*args):
            raise RuntimeError(f"planted {name}")
        return original(*args, **kwargs)

    setattr(owner, attribute, wrapped)


def in_a_forward() -> None:
    """Plant all of IN_A_FORWARD. "storing" fails for several rows, of a prompt; "storing one" for one, in decoding."""
    from claa_sglang.forward.late_pass import LatePass
    from claa_sglang.memory.boundary import BoundaryStore
    from claa_sglang.ranking.rankers import Claa

    def prunes(late: Any, decode: bool) -> bool:
        return late.plan.decode is decode and any(segment.state for segment in late.plan.levels[1])

    plant("scoring", Claa, "score_layer")
    plant("ranking", Claa, "rank")
    plant("storing", BoundaryStore, "store", lambda store, slots, *rest: len(slots) > 1)
    plant("storing one", BoundaryStore, "store", lambda store, slots, *rest: len(slots) == 1)
    plant("late pass", LatePass, "cross", lambda late, *rest: prunes(late, decode=False))
    plant("decoding", LatePass, "cross", lambda late, *rest: prunes(late, decode=True))
