"""What is compared: the dense run of a prompt, and pruned ones by several rankers at several keep rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from claa_sglang.tasks.rankings import load

DENSE_NAME = "dense"
STOCK_NAME = "stock"  # a server without CLAA; only timed, as its answers are dense's
READS_ALL = ", decoding over all"
EVERY_LAYER = 9999  # more than any model has
DEFAULT_RANKER = "claa"  # the server's own; its name is not sent


class Setting(msgspec.Struct, frozen=True):
    """One way to run a prompt.

    ranker: DENSE_NAME, a ranker the server knows, or a ranking made elsewhere; with READS_ALL after the name, generated
    tokens read the whole prompt in all early layers (of a server with --claa-decode-dense-layers).
    """

    ranker: str
    keep_rate: float = 1.0

    @property
    def name(self) -> str:
        return self.ranker if self.ranker in (DENSE_NAME, STOCK_NAME) else f"{self.ranker} {self.keep_rate:g}"

    @property
    def dense(self) -> bool:
        return self.ranker == DENSE_NAME


DENSE, STOCK = Setting(DENSE_NAME), Setting(STOCK_NAME)


def settings(rankers: Sequence[str], keep_rates: Sequence[float], both_ways: bool = False) -> list[Setting]:
    """Dense first, then every ranker at every keep rate. both_ways: each also with READS_ALL."""
    names = [ranker + way for ranker in rankers for way in (("", READS_ALL) if both_ways else ("",))]
    return [DENSE, *(Setting(name, rate) for name in names for rate in keep_rates)]


class RankingError(ValueError):
    """A ranking made elsewhere does not fit; the message says which and why."""


Rankings = Mapping[str, Mapping[str, list[int]]]  # name -> key -> order


def load_rankings(files: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Rankings made elsewhere, from NAME=FILE arguments; FILE as in tasks/rankings.py. Raises RankingError."""
    found: dict[str, dict[str, list[int]]] = {}
    for argument in files:
        name, equals, path = argument.partition("=")
        if not equals or not Path(path).is_file():
            raise RankingError(f"--given {argument!r}: expected NAME=FILE, a JSONL file with key and order")
        try:
            found[name] = load(Path(path))
        except msgspec.DecodeError as error:
            raise RankingError(f"{path}: {error}. A line is {{'key': …, 'order': [positions, best first]}}") from error
    return found


def options(setting: Setting, key: str, tokens: int, window: int, rankings: Rankings) -> dict[str, Any]:
    """`custom_params.claa` of a request for the prompt `key` of so many tokens.

    A ranking made elsewhere is sent as the positions to keep, `int(keep_rate * tokens)` of them as in the server: the
    last `window` and the first one, which are always kept, and the best others. Raises RankingError if it ranks another
    prompt.
    """
    if setting.dense:
        return {"enabled": False}
    ranker = setting.ranker.removesuffix(READS_ALL)
    decoding = {} if ranker == setting.ranker else {"decode_dense_layers": EVERY_LAYER}
    # What another setting left in the cache is not to be made dense for this one.
    pruned = {"policy": "always", "keep_rate": setting.keep_rate, "finish": False, **decoding}
    if ranker == DEFAULT_RANKER:
        return pruned
    if ranker not in rankings:
        return {**pruned, "ranker": ranker}
    order = rankings[ranker].get(key)
    if order is None or any(not 0 <= position < tokens for position in order):
        reason = "is missing" if order is None else f"has positions beyond its {tokens} tokens"
        raise RankingError(f"ranking {ranker!r}: prompt {key} {reason}; rank the same prompts with this model")
    first = tokens - window
    room = max(0, int(setting.keep_rate * tokens) - window)
    always = [0] if room and first > 0 else []
    best = [position for position in order if 0 < position < first][: max(0, room - 1)]
    return {**decoding, "keep": [*always, *sorted(best), *range(max(0, first), tokens)]}
