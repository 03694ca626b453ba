"""How much is asked: lengths and counts, from what the server is and what the operator wants."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from claa_sglang.verify.error import VerifyError

LEAST_TOKENS = 1280
ABOVE_LEAST = 1.25  # times --claa-min-prompt-tokens: lengths of texts are guesses
NEW_TOKENS = 24  # of an answer that is compared
TTFT_TOKENS = (8192, 4096, 2048)  # the first that is a small part of the pool
POOL_SHARE = 0.25  # of the pool that a run may turn over, where it can choose
# Of each prompt: asked dense twice, dense on a hit, pruned, pruned on a hit, two further questions, three at once, and
# keep rate 1; of these, seven are cold.
REQUESTS, COLD = 11, 7
NEEDLE_ROOM = 32
LEAST_PAIRS = 5  # of times


class Plan(msgspec.Struct, frozen=True):
    """tokens: of a prompt. ttft_tokens: of one that is timed. prompts, needles, pairs: how many.

    pool: KV slots of the server, in tokens; None if it does not say. replicas: of data parallelism.
    """

    tokens: int
    ttft_tokens: int
    prompts: int
    needles: int
    pairs: int
    pool: int | None
    replicas: int
    prefix_cache: bool

    @property
    def requests(self) -> int:
        """At most so many."""
        retries = 3 * self.prompts * (self.replicas - 1)  # of three hits
        return REQUESTS * self.prompts + retries + 2 * self.needles + 2 * (self.pairs + 1) + 2

    @property
    def entered(self) -> int:
        """About so many tokens will go into the prefix cache."""
        return _entered(self.tokens, self.ttft_tokens, self.prompts, self.needles, self.pairs)

    @property
    def lines(self) -> list[str]:
        """In words."""
        share = f", {self.entered / self.pool:.0%} of the pool" if self.pool else ""
        said = [
            f"About {self.requests} requests: answers to prompts of {self.tokens:,} tokens, and the TTFT of "
            f"{self.ttft_tokens:,}.",
            f"About {self.entered:,} tokens go into the prefix cache{share}.",
        ]
        if self.pool and self.entered > self.pool:
            said.append(
                "That turns the whole cache over: ask less with --prompts, --needles, --pairs or --tokens if others "
                "need it."
            )
        return said


def make(args: argparse.Namespace, info: Mapping[str, Any]) -> Plan:
    """The plan of one run. info: of /server_info. Raises VerifyError for what does not fit the server."""
    config, pool, limit = info["claa"]["config"], info.get("max_total_num_tokens"), info.get("max_req_input_len")
    least = int(config.get("min_prompt_tokens") or 0)
    tokens = args.tokens or max(LEAST_TOKENS, math.ceil(ABOVE_LEAST * least))
    counts = (args.prompts, args.needles, args.pairs)
    ttft = args.ttft_tokens
    if ttft is None:
        fits = (n for n in TTFT_TOKENS if _fits(n, limit) and _entered(tokens, n, *counts) <= POOL_SHARE * (pool or n))
        ttft = next(fits, tokens)
    for name, given in (("--tokens", tokens), ("--ttft-tokens", ttft)):
        if given <= max(least, config["window"]):
            what = "--claa-min-prompt-tokens" if given <= least else "--claa-window"
            raise VerifyError(
                f"{name} {given}: the server prunes prompts above {max(least, config['window'])} tokens "
                f"({what}): give more"
            )
        if not _fits(given, limit):
            raise VerifyError(f"{name} {given}: the server takes prompts of {limit} tokens: give fewer")
    return Plan(
        *(tokens, ttft, *counts),
        pool=pool,
        replicas=int(info.get("dp_size") or 1),
        prefix_cache=not info.get("disable_radix_cache"),
    )


def _entered(tokens: int, ttft: int, prompts: int, needles: int, pairs: int) -> int:
    answers = COLD * prompts * (tokens + 2 * NEW_TOKENS) + 2 * needles * (tokens + NEEDLE_ROOM)
    return answers + 2 * (pairs + 1) * ttft + 2 * tokens


def _fits(tokens: int, limit: int | None) -> bool:
    return limit is None or tokens + NEW_TOKENS < limit
