"""What is done to the engines in each scenario: one function makes one round at one prompt length.

In a round every engine serves the same prompts, one engine at a time, in an order that is reversed from round to round.
Prompts are random tokens, new in every round, and an engine's prefix cache is emptied before its turn, unless a
scenario says otherwise. A turn whose requests were not served as they were meant to be (pruned or dense, cached or not)
is an error.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from benchmarks.ttft import variants
from benchmarks.ttft.engines import Answer, EngineProcess, Request
from benchmarks.ttft.settings import (
    CHAT_ANSWER,
    DECODE_TOKENS,
    DENSE_TOKENS,
    MIXED_SHORTS,
    QUESTION,
    SHORT,
    TURN_ANSWER,
    Settings,
)
from benchmarks.ttft.variants import AGAIN, PER_TOKEN, STOCK, TTFT, auto, keep, options

PAGE = 128  # tokens: the largest page of a KV pool
Samples = dict[tuple[str, str], float]  # (quantity, variant) -> seconds
Options = dict[str, Any] | None  # `custom_params["claa"]` of a request; None for a stock engine
Ask = Callable[[EngineProcess, Options], dict[str, float]]  # does something to an engine; values by quantity


class Turn(NamedTuple):
    """One engine's part of a round: who it stands for, the engine's name, what is asked of it, with which options."""

    variant: str
    engine: str
    ask: Ask
    claa: Options = None


class Lab:
    """The engines that live, by name, and where prompts come from. Turns of other engines are left out of a round."""

    def __init__(self, engines: dict[str, EngineProcess], settings: Settings, vocab_size: int):
        self.engines = engines
        self.settings = settings
        self.index = 0  # of the round
        self._tokens = range(100, vocab_size - 100)  # ordinary ones: what is computed does not depend on which
        self._rng = random.Random(0)

    def prompt(self, tokens: int, seed: str | None = None) -> list[int]:
        """Random tokens that nobody has sent before; with `seed`, the same ones every time."""
        rng = self._rng if seed is None else random.Random(seed)
        return rng.choices(self._tokens, k=tokens)

    def serve(self, round: Callable[[Lab, int], Samples], tokens: int, index: int) -> Samples:
        """Round number `index` of a scenario at prompts of `tokens`."""
        self.index = index
        return round(self, tokens)

    def round(self, turns: list[Turn], flush: bool = True) -> Samples:
        """Values of every turn whose engine lives, in the order of `turns`, whichever was taken first."""
        answers: dict[str, dict[str, float]] = {}
        for turn in turns if self.index % 2 else turns[::-1]:
            if (engine := self.engines.get(turn.engine)) is None:
                continue
            if flush:
                engine.flush()
            time.sleep(self.settings.rest)
            answers[turn.variant] = turn.ask(engine, turn.claa)
        names = [turn.variant for turn in turns if turn.variant in answers]
        return {(quantity, name): value for name in names for quantity, value in answers[name].items()}

    def stock_and_pruned(self, ask: Ask) -> list[Turn]:
        """`ask` for stock, and for each keep rate."""
        pruned = [Turn(keep(rate), "claa", ask, options(rate)) for rate in self.settings.keep_rates]
        return [Turn(STOCK, "stock", ask), Turn(AGAIN, "again", ask), *pruned]

    def late_turns(self, tokens: int) -> list[Turn]:
        """What late(kN) is made of, for each keep rate: the truncated models, given as many tokens as are kept."""
        turns = []
        for rate in self.settings.keep_rates:
            ask = partial(time_one, self.prompt(max(1, int(rate * tokens))))
            turns += [Turn(variants.late(rate), "late", ask), Turn(variants.one(rate), "one", ask)]
        return turns


def cold(lab: Lab, tokens: int) -> Samples:
    """One request alone, nothing cached, one output token, pruned always and as the server thinks best; and the
    truncated models for its bound and for the bound's control."""
    ask = partial(time_one, lab.prompt(tokens))
    rates = lab.settings.keep_rates
    return lab.round(
        [
            *lab.stock_and_pruned(ask),
            *(Turn(auto(rate), "claa", ask, options(rate, "auto")) for rate in rates),
            Turn(variants.EARLY, "early", ask),
            Turn(variants.ONE, "one", ask),
            *lab.late_turns(tokens),
        ]
    )


def dense(lab: Lab, tokens: int) -> Samples:
    """One request that opts out of pruning, against stock: TTFT, and time per output token."""
    prompt = lab.prompt(tokens)

    def ask(engine: EngineProcess, claa: Options) -> dict[str, float]:
        (answer,) = engine.run(Request(input_ids=prompt, new_tokens=DENSE_TOKENS, claa=claa))
        check(answer, claa)
        return {TTFT: answer.ttft, PER_TOKEN: per_token([answer])}

    dense = Turn(variants.DENSE, "claa", ask, {"enabled": False})
    return lab.round([Turn(STOCK, "stock", ask), Turn(AGAIN, "again", ask), dense])


def shared_prefix(lab: Lab, tokens: int) -> Samples:
    """A request whose first half another one has left in the cache."""
    prefix = lab.prompt(tokens // 2)
    other, rest = lab.prompt(QUESTION), lab.prompt(tokens - tokens // 2)

    def ask(engine: EngineProcess, claa: Options) -> dict[str, float]:
        engine.run(Request(input_ids=prefix + other, claa=claa))
        return time_one(prefix + rest, engine, claa, cached=len(prefix))

    return lab.round(lab.stock_and_pruned(ask))


def second_turn(lab: Lab, tokens: int) -> Samples:
    """A question of 64 tokens after a prompt of `tokens` and its answer; and the truncated models for late(kN)."""
    prompt, question = lab.prompt(tokens), lab.prompt(QUESTION)

    def ask(engine: EngineProcess, claa: Options) -> dict[str, float]:
        (first,) = engine.run(Request(input_ids=prompt, new_tokens=TURN_ANSWER, claa=claa))
        return time_one(prompt + first.output_ids + question, engine, claa, cached=tokens)

    return lab.round([*lab.stock_and_pruned(ask), *lab.late_turns(tokens)])


def growing_chat(lab: Lab, tokens: int) -> Samples:
    """A whole chat, turn after turn: sum of TTFT, and how many turns were pruned. tokens: of the last prompt."""
    chat, text = lab.settings.chat, lab.prompt(tokens)
    ends = [chat.first + (tokens - chat.first) * turn // (chat.turns - 1) for turn in range(chat.turns)]

    ask = partial(ask_chat, text, ends, lambda claa: None)
    pruned = [Turn(auto(rate), "claa", ask, options(rate, "auto")) for rate in lab.settings.keep_rates]
    return lab.round([Turn(STOCK, "stock", ask), Turn(AGAIN, "again", ask), *pruned])


def mixed(lab: Lab, tokens: int) -> Samples:
    """Short requests that arrive one by one while a long prompt is prefilled."""
    prompt, shorts = lab.prompt(tokens), [lab.prompt(SHORT) for _ in range(MIXED_SHORTS)]
    gap = lab.settings.mixed_gap

    def ask(engine: EngineProcess, claa: Options) -> dict[str, float]:
        following = [Request(input_ids=p, claa=claa, at=(index + 0.5) * gap) for index, p in enumerate(shorts)]
        first, *rest = engine.run(Request(input_ids=prompt, claa=claa), *following)
        check(first, claa)
        return {
            variants.LONG_TTFT: first.ttft,
            variants.SHORT_TTFT: statistics.median(answer.ttft for answer in rest),
        }

    return lab.round(lab.stock_and_pruned(ask))


def decode(lab: Lab, tokens: int) -> Samples:
    """Time per output token of each batch, all of it decoding. Its prompts are the same in every round, and cached.

    They stay pruned where the server finishes prefixes, for scenarios with pauses in the same run. A server of
    `decode_dense_layers` is asked both ways.
    """
    samples: Samples = {}
    for batch in lab.settings.batches(tokens):
        prompts = [lab.prompt(tokens, f"decode {tokens} {index}") for index in range(batch)]

        def ask(engine: EngineProcess, claa: Options, prompts: list[list[int]] = prompts) -> dict[str, float]:
            claa = claa and {**claa, "finish": False}
            answers = engine.run(*(Request(input_ids=p, new_tokens=DECODE_TOKENS, claa=claa) for p in prompts))
            for answer in answers:
                check(answer, claa, cached=None)
            return {variants.per_token(len(prompts)): per_token(answers)}

        turns = lab.stock_and_pruned(ask)
        if (layers := lab.settings.decode_dense_layers) >= 0:
            turns = [turn._replace(claa=turn.claa and {**turn.claa, **variants.OVER_ALL}) for turn in turns]
            rates = lab.settings.keep_rates
            over_kept = [options(rate) | {"decode_dense_layers": layers} for rate in rates]
            turns += [Turn(variants.over_kept(r), "claa", ask, claa) for r, claa in zip(rates, over_kept, strict=True)]
        samples |= lab.round(turns, flush=False)
    return samples


def burst(lab: Lab, tokens: int) -> Samples:
    """Several requests that arrive together, at each concurrency: time until the last one has its token."""
    samples: Samples = {}
    for count in lab.settings.concurrency:
        samples |= lab.round(lab.stock_and_pruned(partial(time_all, [lab.prompt(tokens) for _ in range(count)])))
    return samples


# --- parts of a turn ---


def time_one(prompt: list[int], engine: EngineProcess, claa: Options, cached: int = 0) -> dict[str, float]:
    """TTFT of one request with one output token, `cached` or more of whose tokens are a prefix hit.

    Where the server chooses, also whether it pruned.
    """
    (answer,) = engine.run(Request(input_ids=prompt, claa=claa))
    check(answer, claa, cached)
    chosen = {variants.PRUNED_TURNS: float(answer.report["pruned"])} if chooses(claa) else {}
    return {TTFT: answer.ttft, **chosen}


def ask_chat(
    text: list[int], ends: list[int], rest: Callable[[Options], None], engine: EngineProcess, claa: Options
) -> dict[str, float]:
    """A chat whose prompts end where `ends` says, each going on from the answer before: sum of TTFT, turns pruned.

    rest: called after each answer.
    """
    history: list[int] = []
    total, pruned = 0.0, 0
    for end in ends:
        prompt = history + text[len(history) : end]
        (answer,) = engine.run(Request(input_ids=prompt, new_tokens=CHAT_ANSWER, claa=claa))
        history = prompt + answer.output_ids
        total += answer.ttft
        pruned += answer.report.get("pruned", False)
        rest(claa)
    return {variants.SUM_TTFT: total, variants.PRUNED_TURNS: pruned}


def time_all(prompts: list[list[int]], engine: EngineProcess, claa: Options) -> dict[str, float]:
    """Seconds until the last of `prompts`, sent together, has its one token."""
    answers = engine.run(*(Request(input_ids=prompt, claa=claa) for prompt in prompts))
    for answer in answers:
        check(answer, claa)
    return {variants.total(len(prompts)): max(answer.end for answer in answers)}


def check(answer: Answer, claa: Options, cached: int | None = 0) -> None:
    """Raise RuntimeError unless this is the request that was to be measured.

    It is pruned just where its options ask for it (policy auto: as the server likes), and finds no prefix in the cache
    (cached 0), or at least `cached` tokens, less an incomplete page; None: any.
    """
    pruned = claa is not None and claa.get("enabled", True)
    if not chooses(claa) and answer.report.get("pruned", False) != pruned:
        raise RuntimeError(f"this request was to run {'pruned' if pruned else 'dense'}: {answer.report}")
    if cached is not None and not (answer.cached > cached - PAGE if cached else answer.cached == 0):
        raise RuntimeError(f"{answer.cached} tokens were cached, {cached or 'none'} should have been: {answer.report}")


def chooses(claa: Options) -> bool:
    """Whether the server is to choose between pruned and dense."""
    return claa is not None and claa.get("policy") == "auto"


def per_token(answers: list[Answer]) -> float:
    """Seconds per output token while all of `answers` decode: from the last one's first token to the first one's end.

    The mean over answers of time over tokens. Measured inside one generation, so that no prefill has to be subtracted.
    Raises RuntimeError where there is no such time.
    """
    begin, end = max(answer.chunks[0][0] for answer in answers), min(answer.end for answer in answers)
    speeds = []
    for answer in answers:
        inside = [chunk for chunk in answer.chunks if begin <= chunk[0] <= end]
        if len(inside) < 2:
            raise RuntimeError(f"{len(answers)} requests never decoded all at once; ask for longer answers")
        (first, before), (last, after) = inside[0], inside[-1]
        speeds.append((last - first) / (after - before))
    return statistics.mean(speeds)
