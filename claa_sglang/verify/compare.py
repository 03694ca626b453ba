"""Whether two answers to one prompt are the same, where sums of other batches may round otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from claa_sglang.verify.client import TOPS, Answer

IDENTICAL, NEAR_TIE, UNDECIDED, DIFFERENT = "identical", "near-tie", "undecided", "different"
OUTCOMES = (IDENTICAL, NEAR_TIE, DIFFERENT, UNDECIDED)


class Noise(msgspec.Struct, frozen=True):
    """What rounding may do on this server.

    tie: largest lead of a token, in nats, over one that may take its place. apart: largest difference of the log
    probabilities of one token. rim: largest share of the kept tokens that may be others, at the edge of the ranking.
    """

    tie: float
    apart: float
    rim: float


# By what the KV cache holds. The tie of float32 is that of benchmarks/load.py; 16 bits part up to 0.25 nats on stock
# too, and 8 bits up to 0.375 (docs/results/backends.md). Kept sets: docs/results/answers-turns.md.
FLOAT32 = Noise(tie=1e-4, apart=1e-3, rim=0.01)
HALF = Noise(tie=0.25, apart=2.5, rim=0.03)
FP8 = Noise(tie=0.5, apart=5.0, rim=0.05)
RIM_LEAST = 2  # positions: one takes the place of another


def noise_of(info: Mapping[str, Any]) -> Noise:
    """Of a server, by its /server_info."""
    if "fp8" in str(info.get("kv_cache_dtype")):
        return FP8
    return FLOAT32 if str(info.get("dtype")).removeprefix("torch.") in ("float32", "float") else HALF


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two answers to one prompt.

    position: of the first generated token that differs. lead: how much likelier a choice was than the other one there,
    in nats: the larger of both sides; None where the other one is not among the likeliest TOPS. apart: largest
    difference of the log probabilities of the tokens before.
    kept, kept_apart: tokens that the first prune kept, and of these, positions that only one side kept.
    """

    what: str
    outcome: str
    why: str = ""
    tokens: int = 0
    position: int | None = None
    lead: float | None = None
    apart: float | None = None
    kept: int | None = None
    kept_apart: int | None = None


def undecided(what: str, why: str) -> Comparison:
    """Of two answers that cannot be held against each other."""
    return Comparison(what=what, outcome=UNDECIDED, why=why)


def compare(what: str, one: Answer, other: Answer, noise: Noise) -> Comparison:
    """Hold `other` against `one`. Both are answers to the same prompt, with log probabilities."""
    pairs = list(zip(one.tokens, other.tokens, strict=False))
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    common = len(pairs) if position is None else position
    apart = max((abs(a - b) for a, b in zip(one.chosen[:common], other.chosen[:common], strict=False)), default=0.0)
    found: Callable[..., Comparison] = lambda outcome, why="", lead=None: Comparison(  # noqa: E731
        what=what,
        outcome=outcome,
        why=why,
        tokens=len(one.tokens),
        position=position,
        lead=lead,
        apart=apart,
        kept=len(one.kept) if one.kept is not None else None,
        kept_apart=rim,
    )
    rim = None if one.kept is None or other.kept is None else len(set(one.kept) ^ set(other.kept))
    if rim and rim > max(RIM_LEAST, noise.rim * len(one.kept or ())):
        return found(DIFFERENT, f"{rim} of {len(one.kept or ())} kept positions differ")
    if apart > noise.apart and not rim:
        return found(DIFFERENT, f"log probabilities of the same tokens are {apart:.2g} nats apart")
    if position is None:
        if len(one.tokens) != len(other.tokens):
            return found(DIFFERENT, f"{len(one.tokens)} and {len(other.tokens)} tokens")
        return found(IDENTICAL)
    lead = max(_lead(one, other, position), _lead(other, one, position))
    known = f"one choice leads by {lead:.2g} nats" if lead < math.inf else f"it is not among the {TOPS} likeliest"
    said = f"token {position} of {len(one.tokens)} differs, where {known}"
    if lead < noise.tie:
        return found(NEAR_TIE, said, lead)
    if rim:
        return found(
            UNDECIDED, f"{said}, after {rim} of {len(one.kept or ())} kept positions, at the ranking's edge", lead
        )
    return found(DIFFERENT, said, lead if lead < math.inf else None)


def _lead(mine: Answer, theirs: Answer, position: int) -> float:
    """By how much `mine` preferred its own token to theirs."""
    if position >= len(mine.tops) or position >= len(mine.chosen):
        return math.inf
    return mine.chosen[position] - mine.tops[position].get(theirs.tokens[position], -math.inf)


def verdict(comparisons: Iterable[Comparison]) -> bool | None:
    """False where one differs; None where nothing shows that two are the same."""
    outcomes = {one.outcome for one in comparisons}
    return False if DIFFERENT in outcomes else True if IDENTICAL in outcomes else None


def counted(comparisons: Iterable[Comparison]) -> str:
    """In words, such as "5 identical, 2 near-ties"."""
    outcomes = [one.outcome for one in comparisons]
    said = [(name, outcomes.count(name)) for name in OUTCOMES if name in outcomes]
    plural = {NEAR_TIE: "near-ties"}
    return ", ".join(f"{count} {plural.get(name, name) if count > 1 else name}" for name, count in said)
