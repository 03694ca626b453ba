"""The table, and the record of a run."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from claa_sglang import __version__
from claa_sglang.verify.claims import Claim
from claa_sglang.verify.compare import Noise
from claa_sglang.verify.cost import Cost
from claa_sglang.verify.plan import Plan

MARKS = {True: "ok", False: "NO", None: "--"}
SAID = ("model_path", "dtype", "kv_cache_dtype", "device", "attention_backend", "tp_size", "dp_size", "page_size")


def table(claims: Sequence[Claim]) -> list[str]:
    """A line for each claim, and more below it where something is to be said."""
    rows = [("", "claim", "compared", "found"), *((MARKS[c.ok], c.name, c.compared, c.found) for c in claims)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row, claim in zip(rows, [None, *claims], strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, [2, *widths[1:]], strict=False)]
        lines.append("  ".join([*cells, row[3]]).rstrip())
        lines += [f"    {line}" for line in (claim.more if claim else ())]
    return lines


def summary(claims: Sequence[Claim], noise: Noise) -> list[str]:
    """The verdict in words, and what near-ties are."""
    count = {ok: sum(claim.ok is ok for claim in claims) for ok in MARKS}
    failed = [claim.name for claim in claims if claim.ok is False]
    said = f"{count[True]} of {len(claims)} claims hold"
    said += f", {count[None]} undecided" if count[None] else ""
    said += f". FAILED: {'; '.join(failed)}." if failed else "."
    ties = (
        f"A near-tie is another token whose lead is below {noise.tie:g} nats on both sides: neither the same nor wrong."
    )
    return [said, ties]


def record(
    command: Sequence[str],
    info: Mapping[str, Any],
    plan: Plan,
    noise: Noise,
    claims: Sequence[Claim],
    cost: Cost,
) -> dict[str, Any]:
    """JSON values: what was asked of which server, every comparison, and the cost."""
    return {
        "command": " ".join(command),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"claa-sglang": __version__, "sglang": info.get("version"), "python": platform.python_version()},
        "server": {name: info.get(name) for name in SAID} | {"claa": info["claa"]["config"]},
        "plan": {**msgspec.to_builtins(plan), "requests": plan.requests, "entered": plan.entered},
        "noise": msgspec.to_builtins(noise),
        "ok": all(claim.ok is not False for claim in claims),
        "claims": [msgspec.to_builtins(claim) for claim in claims],
        "cost": cost.record(plan.pool),
    }
