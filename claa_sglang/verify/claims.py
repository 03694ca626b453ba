"""What is claimed, and what the answers say of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from claa_sglang.tasks.grade import grade
from claa_sglang.verify import ttft
from claa_sglang.verify.asking import Asked, Keys, is_hit
from claa_sglang.verify.client import DENSE, PRUNED, Answer, Client
from claa_sglang.verify.compare import (
    DIFFERENT,
    IDENTICAL,
    Comparison,
    Noise,
    compare,
    counted,
    undecided,
    verdict,
)
from claa_sglang.verify.plan import LEAST_PAIRS
from claa_sglang.verify.prompts import Needle


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table. ok: None where nothing was shown. compared: how many. more: what is not as it should be."""

    name: str
    ok: bool | None
    compared: str
    found: str
    more: list[str] = []
    comparisons: list[Comparison] = []
    data: dict[str, Any] = {}


def same_dense(asked: Sequence[Asked], noise: Noise) -> Claim:
    """With the switch off, a request's answer is the same twice, and beside pruned ones."""
    found = []
    for number, one in enumerate(asked, 1):
        others = {"again": one.dense_again, "beside two pruned ones": one.dense_together}
        for how, answer in others.items():
            what = f"prompt {number}, {how}"
            if answer is one.dense_together and not one.overlapped:
                found.append(undecided(what, "they were not under way at the same time"))
            else:
                found.append(_held(what, one.dense, answer, noise, pruned=False))
    return _claim("dense is the same twice, and beside pruned", found)


def same_hit(asked: Sequence[Asked], noise: Noise, prefix_cache: bool) -> Claim:
    """What is in the prefix cache changes no answer."""
    name = "a prefix hit answers as cold does"
    if not prefix_cache:
        return Claim(name=name, ok=None, compared="0", found="the server has no prefix cache (--disable-radix-cache)")
    found = []
    for number, one in enumerate(asked, 1):
        for how, cold, hit, pruned in (
            ("dense", one.dense, one.dense_hit, False),
            ("pruned", one.pruned, one.pruned_hit, True),
            ("pruned, another question over the text", one.other, one.other_hit, True),
        ):
            what = f"prompt {number}, {how}"
            if cold.cached or not is_hit(hit):
                found.append(undecided(what, f"{cold.cached} tokens were cached, and then {hit.cached}"))
            else:
                found.append(_held(what, cold, hit, noise, pruned=pruned))
    return _claim(name, found)


def isolated(asked: Sequence[Asked], noise: Noise) -> Claim:
    """Requests at once over one text, with different questions, each get the answer they get alone."""
    found = []
    for number, one in enumerate(asked, 1):
        for question, alone, together in ((1, one.pruned, one.together), (2, one.other, one.other_together)):
            what = f"prompt {number}, question {question}"
            if not one.overlapped:
                found.append(undecided(what, "they were not under way at the same time"))
            else:
                found.append(_held(what, alone, together, noise, pruned=True))
    return _claim("two requests at once are isolated", found)


def whole_is_dense(asked: Sequence[Asked], noise: Noise) -> Claim:
    """Keep rate 1 drops nothing."""
    found = []
    for number, one in enumerate(asked, 1):
        what = f"prompt {number}"
        if not one.whole.pruned:
            found.append(undecided(what, _why_dense(one.whole)))
        else:
            found.append(compare(what, one.dense, one.whole, noise))
    return _claim("keep rate 1 answers as dense does", found)


def _held(what: str, one: Answer, other: Answer, noise: Noise, pruned: bool) -> Comparison:
    """`compare`, of answers that both ran as they were asked to. A dense request that is pruned is a wrong answer."""
    for answer in (one, other):
        if answer.pruned and not pruned:
            return Comparison(what=what, outcome=DIFFERENT, why="it was pruned, though its switch was off")
        if pruned and not answer.pruned:
            return undecided(what, _why_dense(answer))
    return compare(what, one, other, noise)


def _why_dense(answer: Answer) -> str:
    return f"it ran dense: {answer.report.get('reason', 'no reason given')}"


def _claim(name: str, found: list[Comparison]) -> Claim:
    apart = max((one.apart or 0.0 for one in found), default=0.0)
    tokens = sum(one.tokens for one in found)
    rims = [one.kept_apart for one in found if one.kept_apart]
    more = [f"{one.outcome}: {one.what}: {one.why}" for one in found if one.outcome != IDENTICAL]
    if rims:
        more.append(f"kept positions at the edge of the ranking differ in {len(rims)} comparisons, at most {max(rims)}")
    return Claim(
        name=name,
        ok=verdict(found),
        compared=f"{len(found)} answers, {tokens:,} tokens",
        found=f"{counted(found)}; within {apart:.1g} nats",
        more=more,
        comparisons=found,
    )


def needles_found(client: Client, keys: Keys, needles: Sequence[Needle], tokenizer: Any, kind: str) -> Claim:
    """Where dense finds a number in a text, pruned does. tokenizer: for answers without a text. Raises VerifyError."""
    name = "pruned finds the needles that dense finds"
    if not needles:
        return Claim(name=name, ok=None, compared="0", found="not asked: no tokenizer here or on the server")
    rows, lost, odd = [], [], []
    both = dense_found = pruned_found = 0
    for number, needle in enumerate(needles, 1):
        key = keys.new()
        answers = [client.ask(needle.prompt, claa, needle.room, key, compared=False) for claa in (DENSE, PRUNED)]
        said = [_said(answer, tokenizer) for answer in answers]
        dense, pruned = (grade(text, needle.answers) == 1 for text in said)
        rows.append({"answers": needle.answers, "dense": said[0], "pruned": said[1], "found": [dense, pruned]})
        if not answers[1].pruned:
            odd.append(f"undecided: needle {number}: {_why_dense(answers[1])}")
            continue
        dense_found, pruned_found, both = dense_found + dense, pruned_found + pruned, both + (dense and pruned)
        if dense and not pruned:
            lost.append(f"lost: needle {number}: it is {', '.join(needle.answers)}, pruned says {said[1].strip()!r}")
    asked = len(needles) - len(odd)
    return Claim(
        name=name,
        ok=False if lost else True if dense_found else None,
        compared=f"{asked} {kind}",
        found=f"{both} of {dense_found} that dense finds, and {pruned_found - both} others",
        more=[*lost, *odd],
        data={"needles": rows},
    )


def _said(answer: Answer, tokenizer: Any) -> str:
    return answer.text if answer.text is not None else tokenizer.decode(answer.tokens)


def faster(times: ttft.Times, at_most: float) -> Claim:
    """The ratio of TTFT, pruned over dense, of cold prompts. at_most: the claim."""
    name, ratio = f"TTFT, pruned : dense, is at most {at_most:g}", ttft.ratio(times)
    more = [f"left out: {why}" for why in _counted(times.left_out)]
    data = {"ttft": msgspec.to_builtins(times), "ratio": None if ratio is None else msgspec.to_builtins(ratio)}
    if ratio is None:
        few = f"fewer than {LEAST_PAIRS} pairs are left"
        return Claim(name=name, ok=None, compared=f"{len(times.pruned)} pairs", found=few, more=more, data=data)
    ok = True if ratio.high <= at_most else False if ratio.low > at_most else None
    middle = {kind: _median_ms(seconds) for kind, seconds in (("pruned", times.pruned), ("dense", times.dense))}
    return Claim(
        name=name,
        ok=ok,
        compared=f"{len(times.pruned)} pairs, {max(times.tokens):,} tokens",
        found=f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}, {ratio.coverage:.0%}); "
        f"{middle['pruned']} : {middle['dense']} ms",
        more=more + (["undecided: the interval has the limit inside: give more --pairs"] if ok is None else []),
        data=data,
    )


def _median_ms(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):,.0f}"


def _counted(reasons: Iterable[str]) -> list[str]:
    every = list(reasons)
    return [f"{every.count(reason)} x {reason}" for reason in dict.fromkeys(every)]
