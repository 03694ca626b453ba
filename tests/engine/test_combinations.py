"""What users combine with pruning: every feature works on a pruned request, or says why it runs dense, or is a 400.

"Works" is held against the reference: its logits, changed as the request's parameters say, have the answer's tokens as
their first choices. Dense requests are held against the same rules, so these are SGLang's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, TOLERANCE, Answer, Ask, check, check_idle
from tests.byte_tokenizer import EOS_ID
from tests.engine.conftest import CLAA_FLAGS
from tests.engine_server import Server, server
from tests.in_flight import Batch, Sent, batches, companion, end_of_log, wait_for
from tests.reference_model import ReferenceModel
from tests.sampling_rules import Grammar, greedy, logits
from tests.ways_out import check_whole

pytestmark = pytest.mark.engine

RUNNING = 4
KEEPS = pytest.mark.parametrize("keep", [0.3, 1.0, None], ids=["pruned", "keeps all", "dense"])
PROMPT = tiny_models.prompt(400, seed=300)
FLAGS = (
    *CLAA_FLAGS,
    *("--chunked-prefill-size", "128"),
    *("--max-running-requests", str(RUNNING)),
    *("--decode-log-interval", "1"),
    "--enable-priority-scheduling",
    "--enable-custom-logit-processor",
)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Server]:
    with server(model, *FLAGS, env=STRICT | ONE_THREAD) as running:
        yield running


def send(running: Server, asked: Ask, params: dict[str, Any] | None = None, **more: Any) -> Any:
    """The body of the answer, pruned exactly if that was asked for."""
    body = running.generate(input_ids=asked.prompt, sampling_params=asked.params() | (params or {}), **more)
    for one in body if isinstance(body, list) else [body]:
        assert one["meta_info"]["claa"]["pruned"] == (asked.keep is not None), one["meta_info"]
    return body


def check_right(reference: ReferenceModel, asked: Ask, body: dict[str, Any]) -> None:
    """Kept positions and tokens of a greedy answer without more parameters."""
    answer = Answer(body["output_ids"], body["meta_info"]["cached_tokens"], body["meta_info"]["claa"])
    keep = asked.keep
    check(
        answer,
        reference.dense(asked.prompt, answer.tokens)
        if keep is None
        else reference.pruned(asked.prompt, answer.tokens, keep),
    )


# --- sampling parameters, each with what it must do to the greedy answer ---

PARAMS: dict[str, dict[str, Any]] = {
    "frequency_penalty": {"frequency_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "logit_bias": {"logit_bias": {"65": 6.0, "300": 4.0, "20": -100.0}},
    "min_new_tokens": {"logit_bias": {str(EOS_ID): 100.0}, "min_new_tokens": 9, "ignore_eos": False},
    "ignore_eos": {"logit_bias": {str(EOS_ID): 100.0}},
    "regex": {"regex": "[0-9]{3}-[a-z]{9}(x|yz)", "ignore_eos": False},
    "json_schema": {
        "json_schema": json.dumps(
            {
                "type": "object",
                "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["left", "right"]}},
                "required": ["a", "b"],
                "additionalProperties": False,
            }
        ),
        "ignore_eos": False,
        "max_new_tokens": 100,
    },
}


def check_rules(reference: ReferenceModel, model: Path, name: str, asked: Ask, tokens: list[int]) -> None:
    """`tokens` is the answer that PARAMS[name] make of the reference's logits."""
    params = PARAMS[name]
    constraint = {key: params[key] for key in ("regex", "json_schema") if key in params}
    grammar = Grammar(model, **constraint) if constraint else None
    assert tokens == greedy(logits(reference, asked, tokens), asked, tokens, params, grammar)


@KEEPS
@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_penalties(served: Server, llama_reference: ReferenceModel, model: Path, name: str, keep: float | None) -> None:
    asked = Ask(PROMPT, keep, new=60)
    tokens = send(served, asked, PARAMS[name])["output_ids"]
    assert len(tokens) == 60 and tokens != send(served, asked)["output_ids"]
    if keep == 1.0:
        assert tokens == send(served, Ask(PROMPT, new=60), PARAMS[name])["output_ids"]
    check_rules(llama_reference, model, name, asked, tokens)


@KEEPS
def test_logit_bias(served: Server, llama_reference: ReferenceModel, model: Path, keep: float | None) -> None:
    asked = Ask(PROMPT, keep, new=20)
    tokens = send(served, asked, PARAMS["logit_bias"])["output_ids"]
    assert len(tokens) == 20 and tokens != send(served, asked)["output_ids"]
    check_rules(llama_reference, model, "logit_bias", asked, tokens)


@KEEPS
def test_min_new_tokens_and_ignore_eos(
    served: Server, llama_reference: ReferenceModel, model: Path, keep: float | None
) -> None:
    asked = Ask(PROMPT, keep, new=15)
    least = send(served, asked, PARAMS["min_new_tokens"])
    assert least["output_ids"][-1] == EOS_ID and len(least["output_ids"]) == 10
    assert least["meta_info"]["finish_reason"]["type"] == "stop"
    check_rules(llama_reference, model, "min_new_tokens", asked, least["output_ids"])
    assert send(served, asked, PARAMS["ignore_eos"])["output_ids"] == [EOS_ID] * 15


@KEEPS
def test_regex(served: Server, llama_reference: ReferenceModel, model: Path, keep: float | None) -> None:
    asked = Ask(PROMPT, keep, new=20)
    answer = send(served, asked, PARAMS["regex"])
    assert re.fullmatch(PARAMS["regex"]["regex"], answer["text"]), answer["text"]
    check_rules(llama_reference, model, "regex", asked, answer["output_ids"])


@KEEPS
def test_json_schema(served: Server, llama_reference: ReferenceModel, model: Path, keep: float | None) -> None:
    asked = Ask(PROMPT, keep)
    answer = send(served, asked, PARAMS["json_schema"])
    value = json.loads(answer["text"])
    assert 0 <= value["a"] <= 99 and value["b"] in ("left", "right") and len(value) == 2
    check_rules(llama_reference, model, "json_schema", asked, answer["output_ids"])


def test_parameters_of_one_batch_stay_apart(served: Server, llama_reference: ReferenceModel, model: Path) -> None:
    """All of the above at once, pruned and dense, coming and going: nobody gets a neighbour's parameters.

    Penalties are company only: when prefills come between its steps, SGLang leaves a token's penalty out.
    """
    served.flush()
    cases = [(name, Ask(PROMPT[: 300 + 7 * i], keep, new=20)) for i, name in enumerate(PARAMS) for keep in (0.3, None)]
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = pool.map(lambda case: send(served, case[1], PARAMS[case[0]])["output_ids"], cases)
        for (name, asked), tokens in zip(cases, answers, strict=True):
            if "penalty" not in name:
                check_rules(llama_reference, model, name, asked, tokens)


def test_custom_logit_processor(served: Server, llama_reference: ReferenceModel) -> None:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    asked = Ask(PROMPT, 0.3, new=12)
    banned = send(served, asked)["output_ids"][:6]
    params = {"custom_params": asked.params()["custom_params"] | {"token_ids": banned}}
    processor = DisallowedTokensLogitsProcessor().to_str()
    tokens = send(served, asked, params, custom_logit_processor=processor)["output_ids"]
    rule = {"logit_bias": {str(token): float("-inf") for token in banned}}
    assert tokens == greedy(logits(llama_reference, asked, tokens), asked, tokens, rule)


@KEEPS
def test_temperature_and_seed(served: Server, llama_reference: ReferenceModel, keep: float | None) -> None:
    """Seeds are taken, but SGLang heeds them with deterministic inference only, which a CPU does not have."""
    asked = Ask(PROMPT, keep, new=16)
    certain = [
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 1.0},
    ]
    for params in certain:
        check_right(llama_reference, asked, send(served, asked, params | {"sampling_seed": 7}))
    samples = send(served, asked, {"temperature": 1.5, "top_k": 3, "n": 6, "sampling_seed": 7})
    assert len({tuple(sample["output_ids"]) for sample in samples}) > 1
    for sample in samples:
        rows = logits(llama_reference, asked, sample["output_ids"])
        third = rows.topk(3).values[:, -1]
        chosen = rows[range(16), sample["output_ids"]]
        assert (chosen >= third - TOLERANCE).all()


# --- what comes back ---


@KEEPS
def test_output_logprobs(served: Server, llama_reference: ReferenceModel, keep: float | None) -> None:
    asked = Ask(PROMPT, keep, new=10)
    some = [3, 250, 500]
    more = {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 5, "token_ids_logprob": some}
    body = send(served, asked, **more)
    check_right(llama_reference, asked, body)
    tokens, meta = body["output_ids"], body["meta_info"]
    rows = logits(llama_reference, asked, tokens).log_softmax(-1)
    assert [token for _, token, _ in meta["output_token_logprobs"]] == tokens
    for i, (row, own) in enumerate(zip(rows, meta["output_token_logprobs"], strict=True)):
        assert own[0] == pytest.approx(row[tokens[i]].item(), abs=TOLERANCE)
        top, named = meta["output_top_logprobs"][i], meta["output_token_ids_logprobs"][i]
        assert [value for value, _, _ in top] == pytest.approx(row.topk(5).values.tolist(), abs=TOLERANCE)
        assert [token for _, token, _ in named] == some
        assert [value for value, _, _ in named] == pytest.approx(row[some].tolist(), abs=TOLERANCE)


def test_return_text_in_logprobs(served: Server, model: Path) -> None:
    from transformers import AutoTokenizer

    body = send(served, Ask(PROMPT, 0.3, new=10), return_logprob=True, return_text_in_logprobs=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = [[token, tokenizer.decode([token])] for token in body["output_ids"]]
    assert [[token, text] for _, token, text in body["meta_info"]["output_token_logprobs"]] == expected


def test_input_logprobs_run_dense(served: Server, llama_reference: ReferenceModel) -> None:
    asked = Ask(PROMPT, 0.3)
    body = served.generate(
        input_ids=PROMPT, sampling_params=asked.params(), return_logprob=True, logprob_start_len=len(PROMPT) - 50
    )
    report = body["meta_info"]["claa"]
    assert not report["pruned"] and "input logprobs" in report["reason"]
    check_right(llama_reference, Ask(PROMPT), body)


@KEEPS
def test_streaming(served: Server, llama_reference: ReferenceModel, keep: float | None) -> None:
    asked = Ask(PROMPT, keep, new=10)
    body = {"input_ids": PROMPT, "sampling_params": asked.params(), "stream": True}
    lines = served.post("/generate", body).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert len(chunks) > 5 and ["claa" in chunk["meta_info"] for chunk in chunks] == [False] * (len(chunks) - 1) + [
        True
    ]
    whole = chunks[-1]["output_ids"]
    assert all(whole[: len(chunk["output_ids"])] == chunk["output_ids"] for chunk in chunks) and len(whole) == 10
    check_right(llama_reference, asked, chunks[-1])


@KEEPS
def test_stop_strings(served: Server, llama_reference: ReferenceModel, keep: float | None) -> None:
    asked = Ask(PROMPT, keep, new=40)
    whole = send(served, asked)
    check_right(llama_reference, asked, whole)
    text = whole["text"]
    end = next(i for i in range(10, len(text)) if text[i : i + 3].isalpha() and text.find(text[i : i + 3]) == i)
    for trimmed, params in ((True, {}), (False, {"no_stop_trim": True})):
        answer = send(served, asked, {"stop": ["no such text", text[end : end + 3]], **params})
        assert answer["text"] == (text[:end] if trimmed else text[: end + 3])
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": text[end : end + 3]}
        assert answer["output_ids"] == whole["output_ids"][: len(answer["output_ids"])]


# --- several at once ---


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_n_samples(served: Server, llama_reference: ReferenceModel, stream: bool) -> None:
    asked = Ask(PROMPT, 0.3, new=10)
    body = {"input_ids": PROMPT, "sampling_params": asked.params() | {"n": 3}, "stream": stream}
    answer = served.post("/generate", body)
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        samples = [chunk for chunk in chunks if "claa" in chunk["meta_info"]]
        assert sorted(sample["index"] for sample in samples) == [0, 1, 2]
    else:
        samples = answer.json()
    assert len(samples) == 3 and all(sample["meta_info"]["claa"]["pruned"] for sample in samples)
    for sample in samples:
        check_right(llama_reference, asked, sample)


def test_batch_requests_and_rids(served: Server, llama_reference: ReferenceModel) -> None:
    served.flush()
    asked = [Ask(PROMPT[: 100 * i], keep, new=5 + i) for i, keep in enumerate((0.2, None, 1.0, 0.6), start=1)]
    rids = [f"mine-{i}" for i in range(4)]
    prompts = [one.prompt for one in asked]
    answers = served.generate(input_ids=prompts, sampling_params=[one.params() for one in asked], rid=rids)
    assert [answer["meta_info"]["id"] for answer in answers] == rids
    for one, answer in zip(asked, answers, strict=True):
        assert answer["meta_info"]["claa"]["pruned"] == (one.keep is not None)
        check_right(llama_reference, one, answer)


def test_priority_preempts_a_pruned_request_which_resumes_with_the_same_answer(
    served: Server, llama_reference: ReferenceModel
) -> None:
    served.flush()
    mark = end_of_log(served)
    low = [companion(i, new=200) for i in range(RUNNING)]
    sent = [Sent(served, one, f"low-{i}", priority=0) for i, one in enumerate(low)]
    full = Batch(False, RUNNING, 0)
    wait_for(lambda: batches(served, mark).count(full) >= 4, "all of low priority decode")
    high = Ask(PROMPT, 0.3, new=20)
    urgent = Sent(served, high, "high", priority=100)  # by more than --priority-scheduling-preemption-threshold
    check_whole(llama_reference, high, urgent)
    retracted = sum(check_whole(llama_reference, *pair)["num_retractions"] for pair in zip(low, sent, strict=True))
    assert retracted > 0
    check_idle(served)


# --- cache namespaces, sessions, embeddings ---


@pytest.mark.parametrize("field", ["extra_key", "cache_salt"])
def test_extra_key_and_cache_salt(served: Server, llama_reference: ReferenceModel, field: str) -> None:
    served.flush()
    asked = Ask(PROMPT, 0.3)
    hits = []
    for value in (None, "a", "b", "a", None):
        body = send(served, asked, **({} if value is None else {field: value}))
        check_right(llama_reference, asked, body)
        hits.append(body["meta_info"]["cached_tokens"] > 0)
    assert hits == [False, False, False, True, True]


def test_session_params_run_dense(served: Server, llama_reference: ReferenceModel) -> None:
    session = served.post("/open_session", {"capacity_of_str_len": 10_000}).json()
    turn, rid = list(PROMPT), None
    for more in (PROMPT, tiny_models.prompt(30, seed=301)):
        params = {"id": session, "rid": rid}
        body = served.generate(input_ids=more, sampling_params=Ask(more, 0.3).params(), session_params=params)
        report, rid = body["meta_info"]["claa"], body["meta_info"]["id"]
        assert not report["pruned"] and "session" in report["reason"]
        turn = turn if more is PROMPT else turn + more
        check_right(llama_reference, Ask(turn), body)
        turn = turn + body["output_ids"]
    served.post("/close_session", {"session_id": session})
    check_idle(served)


def test_input_embeds_are_refused_with_a_prefix_cache(served: Server) -> None:
    answer = served.post("/generate", {"input_embeds": [[0.1] * 64] * 50, "sampling_params": {"max_new_tokens": 2}})
    assert answer.status_code == 400 and "disable-radix-cache" in answer.text, answer.text


def test_input_embeds_run_dense_without_a_prefix_cache(model: Path, llama_reference: ReferenceModel) -> None:
    """In bfloat16, to which SGLang casts embeddings: they must answer as the tokens they are of do."""
    import torch

    dense, pruned = Ask(PROMPT[:150]), Ask(PROMPT, 0.3)
    embeddings = llama_reference.model.model.embed_tokens(torch.tensor(dense.prompt)).tolist()
    flags = (*CLAA_FLAGS, "--disable-radix-cache", "--chunked-prefill-size", "64", "--dtype", "bfloat16")
    with server(model, *flags, env=STRICT | ONE_THREAD) as running:
        answer = running.generate(input_embeds=embeddings, sampling_params=Ask(dense.prompt, 0.3).params())
        report = answer["meta_info"]["claa"]
        assert not report["pruned"] and "embeddings" in report["reason"]
        assert answer["output_ids"] == send(running, dense)["output_ids"]
        first, second = send(running, pruned), send(running, pruned)
        assert first["output_ids"] == second["output_ids"] and second["meta_info"]["cached_tokens"] == 0
        check_idle(running)


# --- OpenAI routes ---


def test_completions_with_penalties_and_logprobs(served: Server, llama_reference: ReferenceModel) -> None:
    text = "".join(chr(97 + token % 26) for token in PROMPT)
    asked = Ask([byte for byte in served.post("/tokenize", {"prompt": text}).json()["tokens"]], 0.3, new=20)
    extra = {"custom_params": asked.params()["custom_params"], "ignore_eos": True}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        answer = client.completions.create(
            model="m", prompt=text, max_tokens=20, temperature=0, frequency_penalty=1.5, logprobs=2, extra_body=extra
        )
    report: Any = answer.model_dump()["metadata"]["claa"]
    assert report["pruned"] and report["prompt_tokens"] == len(asked.prompt) == len(text)
    native = send(served, asked, {"frequency_penalty": 1.5}, return_logprob=True)
    assert answer.choices[0].text == native["text"] and answer.choices[0].logprobs
    values = [value for value, _, _ in native["meta_info"]["output_token_logprobs"]]
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(values, abs=TOLERANCE)


def test_nothing_is_left(served: Server) -> None:
    check_idle(served)
    assert not re.search(r'File ".*claa_sglang', served.log())
