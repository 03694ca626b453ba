"""Names of what is measured, as tables and files have them: who answered a request, and what was timed."""

from __future__ import annotations

from typing import Any

STOCK = "stock"
AGAIN = "stock, again"  # a second process of the same: what two processes differ by without a cause
CLAA = "--enable-claa"  # a whole server
DENSE = "dense, flag on"  # the pruned engine, told to run this request dense
EARLY = "early(N)"
ONE = "one layer, N"
TTFT, PER_TOKEN, START = "TTFT", "time per output token", "start"
SHORT_TTFT, LONG_TTFT, SUM_TTFT, PRUNED_TURNS = "TTFT of the short", "TTFT of the long", "sum of TTFT", "turns pruned"
FIRST_TTFT, LATER_TTFT, MEAN_TTFT = "TTFT of first questions", "TTFT of later questions", "TTFT, mean"
MEDIAN_TTFT, WORST_TTFT = "TTFT, median", "TTFT, longest"
FINISHED = "turns over a finished prefix"
COUNTS = (PRUNED_TURNS, FINISHED)  # quantities that are no seconds
# More options of a request to a server whose generated tokens read what was kept: this one's read the whole prompt.
OVER_ALL = {"decode_dense_layers": 4096}


def keep(rate: float) -> str:
    """Pruned, whatever it costs, to a share `rate` of the prompt."""
    return f"keep {rate:g}"


def auto(rate: float) -> str:
    """Pruned to a share `rate` where the server thinks that it pays."""
    return f"keep {rate:g}, auto"


def unfinished(rate: float) -> str:
    """As `keep`, and what it leaves stays pruned (`finish` false)."""
    return f"keep {rate:g}, unfinished"


def over_kept(rate: float) -> str:
    """As `keep`, and generated tokens read what was kept in early layers too."""
    return f"keep {rate:g}, decoding over kept"


def per_token(batch: int) -> str:
    """Quantity: time per output token of `batch` requests that decode together."""
    return f"{PER_TOKEN}, batch of {batch}"


def batch_of(quantity: str) -> int | None:
    """The batch that `per_token` named; None in the name of anything else."""
    head, _, count = quantity.partition(f"{PER_TOKEN}, batch of ")
    return int(count) if count and not head else None


def late(rate: float) -> str:
    """A copy of the model with as many layers as are late, given that share of the prompt."""
    return f"late layers, {rate:g} N"


def one(rate: float) -> str:
    """A copy of the model with one layer, given that share of the prompt."""
    return f"one layer, {rate:g} N"


def total(count: int) -> str:
    """Quantity: time until all of `count` requests that arrive together have their token."""
    return f"total time of {count}"


def options(rate: float, policy: str = "always") -> dict[str, Any]:
    """`custom_params["claa"]` of a request pruned to `rate`."""
    return {"keep_rate": rate, "policy": policy}
