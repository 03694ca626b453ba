"""One prompt in every way that the claims compare: cold and hit, dense and pruned, alone and with others."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from claa_sglang.verify.client import DENSE, PRUNED, WHOLE, Answer, Client, Prompt
from claa_sglang.verify.plan import NEW_TOKENS
from claa_sglang.verify.prompts import Pair

HIT = 0.5  # share of a prompt that is cached at least where it is a hit


class Keys:
    """Keys of the prefix cache that nobody has used: what is asked under a new one is cold."""

    def __init__(self, run: str):
        self._run, self._count = run, itertools.count()

    def new(self) -> str:
        return f"claa-verify-{self._run}-{next(self._count)}"


class Asked(NamedTuple):
    """The answers to one pair of questions. `other` is the second question, all else the first.

    together, other_together: pruned, and at the same time as dense_together.
    """

    dense: Answer
    dense_again: Answer
    dense_hit: Answer
    pruned: Answer
    pruned_hit: Answer
    other: Answer
    other_hit: Answer
    dense_together: Answer
    together: Answer
    other_together: Answer
    whole: Answer

    @property
    def overlapped(self) -> bool:
        """Whether the three at once were under way at the same time."""
        three = (self.dense_together, self.together, self.other_together)
        return max(one.began for one in three) < min(one.ended for one in three)


def ask_pair(client: Client, keys: Keys, pair: Pair, replicas: int = 1) -> Asked:
    """Ask everything about one text. replicas: a hit is asked for as often at most, until it finds its cache.

    Raises VerifyError.
    """
    first, second = pair
    dense_key, pruned_key, key = keys.new(), keys.new(), keys.new()

    def ask(prompt: Prompt, claa: Mapping[str, Any], key: str) -> Answer:
        return client.ask(prompt, claa, NEW_TOKENS, key)

    def hit(prompt: Prompt, claa: Mapping[str, Any], key: str) -> Answer:
        tries: Iterator[Answer] = (ask(prompt, claa, key) for _ in range(replicas))
        answer = next(tries)
        while not is_hit(answer) and (another := next(tries, None)):
            answer = another
        return answer

    dense, dense_again = ask(first, DENSE, dense_key), ask(first, DENSE, keys.new())
    pruned, other = ask(first, PRUNED, pruned_key), ask(second, PRUNED, keys.new())
    together = ask_together(client, [(first, DENSE), (first, PRUNED), (second, PRUNED)], key)
    return Asked(
        dense=dense,
        dense_again=dense_again,
        dense_hit=hit(first, DENSE, dense_key),
        pruned=pruned,
        pruned_hit=hit(first, PRUNED, pruned_key),
        other=other,
        other_hit=hit(second, PRUNED, pruned_key),
        dense_together=together[0],
        together=together[1],
        other_together=together[2],
        whole=ask(first, WHOLE, keys.new()),
    )


def ask_together(client: Client, asked: Sequence[tuple[Prompt, Mapping[str, Any]]], key: str) -> list[Answer]:
    """Answers of requests that are sent at once, under one key. Raises the first VerifyError once all have ended."""
    ready = threading.Barrier(len(asked))

    def ask(prompt: Prompt, claa: Mapping[str, Any]) -> Answer:
        ready.wait()
        return client.ask(prompt, claa, NEW_TOKENS, key)

    with ThreadPoolExecutor(len(asked)) as threads:
        sent = [threads.submit(ask, *one) for one in asked]
        return [one.result() for one in sent]


def is_hit(answer: Answer) -> bool:
    """Whether most of the prompt came from the prefix cache."""
    return answer.cached >= HIT * answer.prompt_tokens
