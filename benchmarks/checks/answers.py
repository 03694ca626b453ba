"""The same answers, whichever way they are computed: SmolLM2's own weights and English text.

Random weights cannot tell. SGLang's are so small that bf16 rounds away whatever attention adds to the embeddings, so
all answers are equal, right or wrong.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

from claa_sglang.tasks.sources import sentences

TEXT = Path(__file__).resolve().parents[2] / "tests" / "prose.txt"
CHUNK = 2048
GRAPH_BATCH = 4  # largest batch that decodes in a graph; larger ones run eagerly
LENGTHS = (700, 1900, 4500, 7900)  # within a chunk, and of several: a late prefill of several parts at keep rate 1
DECODE_LENGTHS = tuple(range(1000, 1000 + 8 * 37, 37))
NEW_TOKENS = 8  # of the prompts whose log probabilities are compared
DECODED = 32  # of the prompts whose tokens are compared
IDS = 256  # token ids whose log probabilities are compared
DENSE = {"enabled": False}
OPTIONS: dict[str, Any] = {
    "chunked_prefill_size": CHUNK,
    "max_total_tokens": 60_000,
    "mem_fraction_static": 0.9,  # the pool is given; engines side by side see what the others have taken
    "cuda_graph_max_bs_decode": GRAPH_BATCH,
    "enable_claa": True,
    "claa_finish": "off",
    "claa_profile": "none",
    "claa_policy": "always",
    "claa_min_prompt_tokens": 0,
}

Table = list[list[float]]


def prompts(tokenizer: Any, lengths: tuple[int, ...]) -> list[list[int]]:
    """Token ids of English text, another one for each length, the same in every call."""
    found = []
    for index, length in enumerate(lengths):
        text, ids = sentences(str(TEXT), random.Random(index)), []
        while len(ids) < length:
            ids += tokenizer(next(text) + " ", add_special_tokens=False).input_ids
        found.append(ids[:length])
    return found


# --- keep rate 1 --------------------------------------------------------------------------------------------------


def keep_one(engine: Any) -> dict[str, Any]:
    """Log probabilities of IDS fixed ids at the first token of each prompt, dense and at keep rate 1, `[prompts, IDS]`.

    Dense ones are compared with other backends' by the caller. `tokens`: equal tokens of NEW_TOKENS, per prompt.
    """
    tokenizer = engine.tokenizer_manager.tokenizer
    ids = random.Random(1).sample(range(tokenizer.vocab_size), IDS)
    found: dict[str, Any] = {"dense": [], "keep 1": [], "tokens": []}
    for prompt in prompts(tokenizer, LENGTHS):
        tokens = {}
        for kind, claa in (("dense", DENSE), ("keep 1", {"keep_rate": 1.0})):
            answer = engine.generate(
                input_ids=prompt,
                sampling_params=params(NEW_TOKENS, claa),
                return_logprob=True,
                logprob_start_len=-1,
                token_ids_logprob=ids,
            )
            first = answer["meta_info"]["output_token_ids_logprobs"][0]
            found[kind].append([value for value, *_ in first])
            tokens[kind] = answer["output_ids"]
        found["tokens"].append(sum(a == b for a, b in zip(tokens["dense"], tokens["keep 1"], strict=True)))
    return found


def largest(left: Table, right: Table) -> float:
    """Largest absolute difference of two tables of log probabilities."""
    rows = zip(left, right, strict=True)
    return max(abs(a - b) for x, y in rows for a, b in zip(x, y, strict=True))


# --- observing ----------------------------------------------------------------------------------------------------


def ranked(engine: Any, observes: bool) -> list[Seen]:
    """Each prompt's dense answer, and what a prune at keep rate 0.2 keeps of it, or would keep where a server observes.

    A server that observes is asked once, another one dense and pruned. Its prefix cache is empty before each request.
    """
    found, pruned = [], {"keep_rate": 0.2, "return_kept": True}
    for prompt in prompts(engine.tokenizer_manager.tokenizer, LENGTHS):
        answered = [_alone(engine, prompt, claa) for claa in ([pruned] if observes else [DENSE, pruned])]
        report = answered[-1]["meta_info"]["claa"]
        kept = ((report["would_keep"] or {}) if observes else report).get("kept")
        logprobs = [value for value, *_ in answered[0]["meta_info"]["output_token_logprobs"]]
        found.append(Seen(answered[0]["output_ids"], logprobs, kept))
    return found


class Seen(NamedTuple):
    """A dense answer: token ids, their log probabilities; and prompt positions that a prune keeps, None if unknown."""

    tokens: list[int]
    logprobs: list[float]
    kept: list[int] | None


def observing(plain: list[Seen], observed: list[Seen]) -> dict[str, Any]:
    """How a server that observes differs, per prompt: equal tokens, the largest difference of a log probability among
    those, and the share of the kept tokens that it would keep."""
    found: dict[str, Any] = {"equal": [], "difference": [], "kept by both": []}
    for a, b in zip(plain, observed, strict=True):
        equal = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))
        pairs = list(zip(a.logprobs, b.logprobs, strict=True))[:equal]
        found["equal"].append(equal)
        found["difference"].append(max((abs(x - y) for x, y in pairs), default=None))
        found["kept by both"].append(len(set(a.kept or ()) & set(b.kept or ())) / max(1, len(a.kept or ())))
    return found


def _alone(engine: Any, prompt: list[int], claa: dict[str, Any]) -> dict[str, Any]:
    engine.flush_cache()
    return engine.generate(input_ids=prompt, sampling_params=params(DECODED, claa), return_logprob=True)


# --- decode graphs ------------------------------------------------------------------------------------------------


def decoding(engine: Any) -> dict[str, dict[str, list]]:
    """Each way of decoding against decoding alone, in a graph: what `apart` says, per prompt."""
    texts = prompts(engine.tokenizer_manager.tokenizer, DECODE_LENGTHS)
    count = len(texts)
    pruned, dense = params(DECODED, {"keep_rate": 0.3}), params(DECODED, DENSE)
    found = {}
    for kind, ways in (
        ("pruned", [pruned] * count),
        ("mixed", [pruned, dense] * (count // 2)),
        ("dense", [dense] * count),  # stock's own noise
    ):
        alone = [answers(engine, [text], [way])[0] for text, way in zip(texts, ways, strict=True)]
        batches = range(0, count, GRAPH_BATCH)
        fours = [a for i in batches for a in answers(engine, texts[i : i + GRAPH_BATCH], ways[i : i + GRAPH_BATCH])]
        found[f"{kind}, fours in a graph"] = apart(alone, fours)
        found[f"{kind}, eights eagerly"] = apart(alone, answers(engine, texts, ways))
    return found


def answers(engine: Any, texts: list[list[int]], ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return engine.generate(input_ids=texts, sampling_params=ways, return_logprob=True, top_logprobs_num=2)


def apart(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> dict[str, list]:
    """Where two answers to a prompt part: `equal` tokens before, and the `gap` there, None where they do not.

    gap: by how much the log probability of the left one's token exceeds that of its second choice, in nats.
    """
    equal, gaps = [], []
    for a, b in zip(left, right, strict=True):
        pairs = enumerate(zip(a["output_ids"], b["output_ids"], strict=True))
        at = next((i for i, (x, y) in pairs if x != y), None)
        equal.append(len(a["output_ids"]) if at is None else at)
        gaps.append(None if at is None else _gap(a["meta_info"]["output_top_logprobs"][at]))
    return {"equal": equal, "gap": gaps}


def _gap(top: list[Any]) -> float:
    (best, *_), (second, *_) = top[:2]
    return round(best - second, 4)


def params(new: int, claa: dict[str, Any]) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": new, "ignore_eos": True, "custom_params": {"claa": claa}}
