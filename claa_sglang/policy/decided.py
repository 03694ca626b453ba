"""What one tensor-parallel rank measures and decides for all, sent along with the requests."""

from __future__ import annotations

from typing import NamedTuple

from claa_sglang.policy.cost import Constants


class Decided(NamedTuple):
    """None: nothing new.

    constants: of the cost model. finish_after: a step of finishing is due while so many forwards have run, and no more.
    """

    constants: Constants | None = None
    finish_after: int | None = None
