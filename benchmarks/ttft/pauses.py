"""Scenarios with pauses, in which a server may finish what pruned requests left: rounds as in `scenarios.py`.

Somebody reads an answer before asking on. What the server does meanwhile is in no time here; what follows is.
Stock, and requests whose prefix is not to be finished, need no pause: nothing would happen in it.
"""

from __future__ import annotations

import random
import statistics
import time
from functools import partial

from benchmarks.ttft import variants
from benchmarks.ttft.engines import EngineProcess, Request
from benchmarks.ttft.scenarios import PAGE, Lab, Options, Samples, Turn, ask_chat, chooses
from benchmarks.ttft.settings import QUESTION, TURN_ANSWER
from benchmarks.ttft.variants import STOCK, TTFT, auto, keep, options

USERS, QUESTIONS = 8, 5
ARRIVALS = 40  # requests of one round of `arrivals`
PASTES = 5  # long texts in a chat, at equal distances
PASTED = 0.8  # of the tokens of a chat with pastes, those that are pasted


def after_pause(lab: Lab, tokens: int) -> Samples:
    """A question of 64 tokens, `pause` seconds after the answer to a prompt of `tokens`: TTFT, and of the first turn.

    Pruned always, and as the server thinks best; and where nothing is finished, as an at-once question finds it.
    """
    prompt, question = lab.prompt(tokens), lab.prompt(QUESTION)

    def ask(engine: EngineProcess, claa: Options) -> dict[str, float]:
        (first,) = engine.run(Request(input_ids=prompt, new_tokens=TURN_ANSWER, claa=claa))
        pause(lab, claa)
        (second,) = engine.run(Request(input_ids=prompt + first.output_ids + question, claa=claa))
        if second.cached < tokens - PAGE and not chooses(claa):  # it may take a half-finished prefix
            raise RuntimeError(f"{second.cached} tokens were cached of {tokens}: {second.report}")
        finished = {variants.FINISHED: float("finished_tokens" in second.report)} if claa else {}
        return {TTFT: second.ttft, variants.FIRST_TTFT: first.ttft, **finished}

    turns = [Turn(STOCK, "stock", ask)]
    for rate in lab.settings.keep_rates:
        turns += [
            Turn(keep(rate), "claa", ask, options(rate)),
            Turn(auto(rate), "claa", ask, options(rate, "auto")),
            Turn(variants.unfinished(rate), "claa", ask, {**options(rate), "finish": False}),
        ]
    return lab.round(turns)


def thinking_chat(lab: Lab, tokens: int, pasted: float = 0.0) -> Samples:
    """As `growing_chat`, with `pause` seconds between an answer and the next question: sum of TTFT, turns pruned.

    pasted: the share of the chat's tokens that comes in a few long turns.
    """
    chat, text = lab.settings.chat, lab.prompt(tokens)
    ends = chat_ends(chat.first, tokens, chat.turns, pasted)

    ask = partial(ask_chat, text, ends, partial(pause, lab))
    pruned = [Turn(auto(rate), "claa", ask, options(rate, "auto")) for rate in lab.settings.keep_rates]
    return lab.round([Turn(STOCK, "stock", ask), *pruned])


def pause(lab: Lab, claa: Options) -> None:
    """Wait as long as somebody thinks, if the server has something to finish meanwhile."""
    if claa is not None and claa.get("finish", True):
        time.sleep(lab.settings.pause)


def chat_ends(first: int, last: int, turns: int, pasted: float) -> list[int]:
    """Tokens of the prompt of each turn: `first` to `last`; a share `pasted` of the growth comes in PASTES turns."""
    growth, every = last - first, max(1, (turns - 1) // PASTES)
    long = [turn for turn in range(1, turns) if turn % every == 0][:PASTES] if pasted else []
    short = (growth * (1 - pasted)) / max(1, turns - 1 - len(long))
    ends, end = [first], float(first)
    for turn in range(1, turns):
        end += growth * pasted / len(long) if turn in long else short
        ends.append(int(end))
    return [*ends[:-1], last]


def users(lab: Lab, tokens: int) -> Samples:
    """Several users, each with a document of `tokens` and questions about it, one every `think` seconds: TTFT of the
    first questions, and of those after them."""
    documents = [lab.prompt(tokens) for _ in range(USERS)]
    questions = [[lab.prompt(QUESTION) for _ in range(QUESTIONS)] for _ in range(USERS)]
    think, rng = lab.settings.think, random.Random(lab.index)
    starts = [rng.uniform(0, think) for _ in range(USERS)]

    def ask(engine: EngineProcess, claa: Options) -> dict[str, float]:
        requests = [
            Request(input_ids=document + question, new_tokens=TURN_ANSWER, claa=claa, at=start + number * think)
            for document, own, start in zip(documents, questions, starts, strict=True)
            for number, question in enumerate(own)
        ]
        answers = engine.run(*requests)
        first = [answer.ttft for index, answer in enumerate(answers) if index % QUESTIONS == 0]
        later = [answer.ttft for index, answer in enumerate(answers) if index % QUESTIONS]
        return {
            variants.FIRST_TTFT: statistics.median(first),
            variants.LATER_TTFT: statistics.median(later),
            variants.MEAN_TTFT: statistics.mean(answer.ttft for answer in answers),
        }

    pruned = [Turn(auto(rate), "claa", ask, options(rate, "auto")) for rate in lab.settings.keep_rates]
    return lab.round([Turn(STOCK, "stock", ask), *pruned])


def arrivals(lab: Lab, tokens: int) -> Samples:
    """Requests of `tokens` at random times without pauses, with finishing and without: TTFT, median and 99th of 100."""
    rate, rng = lab.settings.rates[-1], random.Random(lab.index)
    times = [0.0]
    while len(times) < ARRIVALS:
        times.append(times[-1] + rng.expovariate(rate))
    prompts = [lab.prompt(tokens) for _ in times]

    def ask(engine: EngineProcess, claa: Options) -> dict[str, float]:
        answers = engine.run(*(Request(input_ids=p, claa=claa, at=at) for p, at in zip(prompts, times, strict=True)))
        ordered = sorted(answer.ttft for answer in answers)
        return {variants.MEDIAN_TTFT: statistics.median(ordered), variants.WORST_TTFT: ordered[-1]}

    turns = []
    for share in lab.settings.keep_rates:
        turns += [
            Turn(keep(share), "claa", ask, options(share)),
            Turn(variants.unfinished(share), "claa", ask, {**options(share), "finish": False}),
        ]
    return lab.round(turns)


pasting_chat = partial(thinking_chat, pasted=PASTED)
