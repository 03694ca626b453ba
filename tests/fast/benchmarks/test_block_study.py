"""The offline study of blocks that read few earlier keys: the rule against plain loops, answers, and counting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from benchmarks import block_study
from benchmarks.blocks import attention
from benchmarks.blocks.answering import answer
from benchmarks.blocks.attention import POOL, Rule, attend, reading_blocks
from benchmarks.blocks.counting import AGAIN, ALL, DENSE, Outcome, rows
from benchmarks.blocks.variant import Variant, VariantError, parse
from benchmarks.tiny_model import build_with_tokenizer
from claa_sglang.tasks.record import Prompt, save
from tests import tiny_models

SINKS, LOCAL, BLOCK, BUDGET = 1, 2, 16, 12
HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 8, 72  # four blocks and half of one
FEW = f"{BUDGET}:block={BLOCK},samples=4"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SINKS", SINKS)
    monkeypatch.setattr(attention, "LOCAL", LOCAL)
    monkeypatch.setattr(attention, "HELD_OUT", 4)


def test_a_name_says_what_runs() -> None:
    assert parse("4096") == Variant(name="4096", budget=4096)
    text = "2048:how=sum,samples=32,block=1024,heads=shared,layers=2-4"
    expected = Variant(
        name=text, budget=2048, block=1024, samples=32, how="sum", heads="shared", layers=(2, 3, 4)
    )  # fmt: skip
    assert parse(text) == expected and parse("9:layers=3").layers == (3,)


@pytest.mark.parametrize("text", ["", "0", "-3", "12:how=mean", "12:samples", "12:block=0", "many", "12:layers=a-b"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(VariantError, match="BUDGET:key=value"):
        parse(text)


def made(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, TOKENS, DIM), (KV_HEADS, TOKENS, DIM), (KV_HEADS, TOKENS, DIM))
    q, k, v = (2 * torch.randn(shape, generator=rng) for shape in shapes)
    return q, k, v


def plainly(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> Tensor:
    """The rule, a query at a time."""
    out, group, scaling = torch.empty_like(q), HEADS // KV_HEADS, DIM**-0.5
    for start in range(0, TOKENS, BLOCK):
        everything = start + BLOCK > TOKENS or start <= max(BUDGET, SINKS + LOCAL)
        scores = torch.zeros(KV_HEADS, start)
        sampled = () if everything else range(start + BLOCK // 4 - 1, start + BLOCK, BLOCK // 4)
        for row in sampled:
            for head in range(HEADS):
                weights = (scaling * k[head // group, :start] @ q[head, row]).softmax(-1)
                old = scores[head // group]
                scores[head // group] = torch.maximum(old, weights) if variant.how == "max" else old + weights
        if variant.heads == "shared":
            scores[:] = scores.amax(0)
        for kv_head in range(KV_HEADS):
            read = set(range(start))
            if not everything:
                pooled = avg_pool1d(scores[kv_head][None], POOL, 1, POOL // 2, count_include_pad=False)[0]
                pooled[:SINKS], pooled[start - LOCAL :] = torch.inf, torch.inf
                read = set(pooled.argsort(descending=True)[:BUDGET].tolist())
            for row in range(start, min(start + BLOCK, TOKENS)):
                seen = sorted(read) + list(range(start, row + 1))
                for head in range(kv_head * group, (kv_head + 1) * group):
                    weights = (scaling * k[kv_head, seen] @ q[head, row]).softmax(-1)
                    out[head, row] = weights @ v[kv_head, seen]
    return out


@pytest.mark.parametrize("more", ["", ",how=sum", ",heads=shared"])
def test_the_rule_is_what_plain_loops_give(more: str) -> None:
    variant = parse(FEW + more)
    q, k, v = made()
    rule = Rule(variant, frozenset({0}))
    torch.testing.assert_close(attend(q, k, v, DIM**-0.5, rule), plainly(q, k, v, variant))
    assert len(rule.shares) == 3 and all(0 < share < 1 for share in rule.shares)


def test_the_share_is_of_weight_on_earlier_tokens() -> None:
    """Of queries that are no samples; each looks at one earlier token almost alone."""
    keys = 50 * torch.eye(DIM)[None].expand(KV_HEADS, -1, -1)
    block = torch.zeros(HEADS, BLOCK, DIM)
    block[:, 2::4] = torch.eye(DIM)[[0, 1, 2, 7]]  # the middle of each quarter is held out
    chosen = torch.tensor([[0, 1, 2], [7, 6, 5]])
    assert attention.share(block, keys, chosen, 1.0, parse(FEW)) == pytest.approx((3 / 4 + 1 / 4) / 2, abs=1e-6)


def test_a_complete_block_does_not_depend_on_what_follows() -> None:
    q, k, v = made()
    other = [torch.cat((x[:, :64], y[:, :5]), 1) for x, y in zip((q, k, v), made(1), strict=True)]
    rules = [Rule(parse(FEW), frozenset({0})) for _ in range(2)]
    one, two = attend(q, k, v, DIM**-0.5, rules[0]), attend(*other, DIM**-0.5, rules[1])
    assert torch.equal(one[:, :64], two[:, :64]) and not torch.equal(one[:, 64:69], two[:, 64:])


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], Path]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32, attn_implementation="sdpa")


def greedy(model: Any, ids: list[int], most: int, variant: Variant | None) -> list[int]:
    """A token at a time, over the prompt's cache."""
    from transformers import DynamicCache

    cache, tokens, rows = DynamicCache(config=model.config), [], ids
    with torch.inference_mode(), reading_blocks(model, variant, 4):
        while len(tokens) < most:
            logits = model(input_ids=torch.tensor([rows]), past_key_values=cache, use_cache=True).logits
            rows = [int(logits[0, -1].argmax())]
            tokens += rows
    return tokens


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_the_greedy_one_whatever_was_read_first(seed: int, llama: Any) -> None:
    ids, few = tiny_models.prompt(TOKENS, seed), parse(FEW)
    dense = answer(llama, ids, 12, 4)
    assert dense.tokens == greedy(llama, ids, 12, None) and dense.share is None
    again = answer(llama, ids, 12, 4, None, dense.tokens)
    assert (again.tokens, again.equal) == (dense.tokens, 12)
    by = answer(llama, ids, 12, 4, few, dense.tokens)
    assert by.tokens == greedy(llama, ids, 12, few) and by.share is not None
    assert by.tokens[: by.equal] == dense.tokens[: by.equal]
    assert by.equal == 12 or by.tokens[by.equal] != dense.tokens[by.equal]
    assert dense.logprob is None and by.logprob and again.logprob and by.logprob < again.logprob < 0
    assert answer(llama, ids, 12, 4, few, dense.tokens[:3]).tokens == by.tokens


def test_layers_that_are_named_read_so_and_others_do_not(llama: Any) -> None:
    ids = tiny_models.prompt(TOKENS, 0)
    blocks = 3
    for name, layers in ((FEW, 4), (f"{FEW},layers=2-3", 2), (f"{FEW},layers=7", 1)):
        with torch.inference_mode(), reading_blocks(llama, parse(name), 4) as rule:
            llama(input_ids=torch.tensor([ids]))
        assert rule is not None and len(rule.shares) == blocks * layers
    assert llama.config._attn_implementation == "sdpa"


def outcome(key: str, variant: str, right: float, **more: Any) -> Outcome:
    values = {"task": "t", "length": 100, "same": True, "logprob": -1.0}
    return Outcome(key=key, variant=variant, right=right, **values | more)


def test_rows_are_of_prompts_that_dense_answered() -> None:
    found = [
        *(outcome(key, DENSE, right) for key, right in (("a", 1.0), ("b", 1.0), ("c", 0.0))),
        *(outcome(key, "8", right, share=0.5) for key, right in (("a", 1.0), ("b", 0.0), ("d", 1.0))),
        outcome("c", "8", 0.0, task="u", same=False, share=0.8),
    ]
    row = next(one for one in rows(found) if (one.variant, one.task) == ("8", ALL))
    assert (row.n, row.right, row.same, row.share) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3), 0.6)
    mean, low, high = row.difference
    assert (mean, low, high) == pytest.approx((-1 / 3, -1 / 3 - 1.96 / 3, -1 / 3 + 1.96 / 3))
    assert [(one.task, one.n) for one in rows(found) if one.variant == "8"] == [(ALL, 3), ("t", 2), ("u", 1)]


def test_a_study_goes_on_where_it_was(tmp_path: Path, small_model_path: Path) -> None:
    model = build_with_tokenizer(tmp_path, small_model_path)
    prompts = [Prompt(input_ids=tiny_models.prompt(TOKENS, i), answers=["x"], max_new_tokens=4) for i in range(3)]
    file, out = tmp_path / "p.jsonl", tmp_path / "o.json"
    save(prompts[:2], file)
    command = [str(file), "--model", str(model), "--variants", FEW, "--out", str(out)]
    assert block_study.main(command) == 0
    known = out.with_suffix(".answers.jsonl")
    first = known.read_bytes()
    known.write_bytes(first + b'{"key": "cut')
    assert [row["n"] for row in json.loads(out.read_text())["rows"] if row["task"] == ALL] == [2, 2, 2]
    known.write_bytes(first)
    save(prompts, file)
    assert block_study.main(command) == 0
    assert known.read_bytes().startswith(first)
    found = [msgspec.json.decode(line, type=Outcome) for line in known.read_bytes().splitlines()]
    assert [one.variant for one in found] == [DENSE, AGAIN, FEW] * 3
    assert block_study.main([str(file), "--model", str(model), "--variants", "few", "--out", str(out)]) == 1
