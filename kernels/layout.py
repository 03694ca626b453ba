"""What the kernels are told about the requests of a batch: the rows of `requests`, int32 `[4, R]`.

A kernel reads a row as `requests + ROW * R + request`, where ROW is a `tl.constexpr` made of one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate


class Row(IntEnum):
    """Per request, with N its tokens and W the window.

    FIRST_ROW: index among the queries of its first window row. TABLE_ROW: row of the request table with its slots.
    TOKENS: N. BEFORE: the sum of N-W over the requests before it.
    """

    FIRST_ROW = 0
    TABLE_ROW = 1
    TOKENS = 2
    BEFORE = 3


def describe(
    first_rows: Sequence[int], table_rows: Sequence[int], tokens: Sequence[int], window: int
) -> list[list[int]]:
    """`requests` on the host, as lists; the three sequences have R entries each."""
    before = list(accumulate((count - window for count in tokens), initial=0))[:-1]
    rows = {Row.FIRST_ROW: first_rows, Row.TABLE_ROW: table_rows, Row.TOKENS: tokens, Row.BEFORE: before}
    return [list(rows[row]) for row in Row]
