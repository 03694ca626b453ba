"""Blocks of queries that read selected keys: what is selected, and that rows list it, with torch in fa3's place."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from benchmarks import block_attention
from benchmarks.block_attention import GROUP, HEAD_DIM, KV_HEADS, POOL, SCALING, Layer, blocks, dense, select

BLOCK, SAMPLES, SINKS, LOCAL = 32, 8, 2, 4
CHUNK, END = 64, 192


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Layer:
    sizes = {"BLOCK": BLOCK, "SINKS": SINKS, "LOCAL": LOCAL, "DTYPE": torch.float32}
    for name, value in sizes.items():
        monkeypatch.setattr(block_attention, name, value)
    monkeypatch.setattr(block_attention, "paged", attention)
    monkeypatch.setattr(block_attention, "window_mass", largest_weights)
    torch.manual_seed(0)
    return Layer(END, CHUNK, "cpu")


def attention(queries: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: list[int], rows: int) -> Tensor:
    found = []
    for index, length in enumerate(lengths):
        own = queries[index * rows : (index + 1) * rows]
        slots = table[index, :length].long()
        k, v = (cache[slots].repeat_interleave(own.shape[1] // cache.shape[1], 1) for cache in (keys, values))
        logits = torch.einsum("qhd,khd->hqk", own, k) * SCALING
        seen = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
        found.append(torch.einsum("hqk,khd->qhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(found)


def largest_weights(q: Tensor, keys: Tensor, table: Tensor, requests: Tensor, *, window: int, **_: object) -> Tensor:
    """`window_mass` with peaks, in torch."""
    found = []
    for first, row, tokens, _before in requests.T.tolist():
        k = keys[table[row, :tokens].long()]
        own = q[first : first + window].view(window, KV_HEADS, GROUP, HEAD_DIM)
        logits = torch.einsum("qhgd,nhd->hgqn", own, k) * SCALING
        seen = torch.ones(window, tokens, dtype=torch.bool).tril(tokens - window)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        found.append(weights.amax((1, 2))[:, : tokens - window].reshape(-1))
    return torch.cat(found)


def test_blocks_that_read_everything_are_dense(layer: Layer) -> None:
    assert torch.equal(blocks(layer, *select(layer, END, END, SAMPLES)), dense(layer, END))
    assert not torch.allclose(blocks(layer, *select(layer, END, 40, SAMPLES)), dense(layer, END), atol=1e-3)


def test_each_block_selects_by_its_own_queries(layer: Layer) -> None:
    budget = 40
    chosen = block_attention.selected(layer, END, budget, SAMPLES)
    for index, start in enumerate((END - CHUNK, END - BLOCK)):
        sample = layer.queries[BLOCK * index : BLOCK * (index + 1)][BLOCK // SAMPLES - 1 :: BLOCK // SAMPLES]
        requests = torch.tensor([[0], [0], [start + SAMPLES], [0]])
        weights = largest_weights(sample, layer.keys, layer.table, requests, window=SAMPLES).view(KV_HEADS, start)
        pooled = avg_pool1d(weights, POOL, 1, POOL // 2)
        for head in range(KV_HEADS):
            mine = set(chosen[index][head].tolist())
            always = {*range(SINKS), *range(start - LOCAL, start)}
            assert always <= mine and len(mine) == budget
            others = sorted(mine - always)
            rest = sorted(set(range(start)) - mine)
            assert pooled[head, others].min() >= pooled[head, rest].max()


def test_a_prompt_within_the_budget_reads_everything(layer: Layer) -> None:
    rows, lengths = select(layer, CHUNK, 40, SAMPLES)
    assert lengths == [BLOCK] * KV_HEADS + [2 * BLOCK] * KV_HEADS and rows.shape == (2 * KV_HEADS, 2 * BLOCK)


def test_every_part_is_timed_for_every_chunk(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def once(run: Callable[[], object], repeats: int) -> list[float]:
        run()
        called.append(run.func.__name__)  # type: ignore[attr-defined]
        return [1.0] * repeats

    monkeypatch.setattr(block_attention, "milliseconds", once)
    monkeypatch.setattr(block_attention, "Layer", lambda tokens, chunk: Layer(tokens, chunk, "cpu"))
    args = argparse.Namespace(chunk=CHUNK, runs=2, samples=[SAMPLES, 4], budgets=[40])
    found = block_attention.measure(END, args)
    chunks = END // CHUNK
    # Of the first chunk every block has room for all that comes before it.
    assert found["dense"]["median"] == chunks and found["40, 4 samples"]["of that, weights"]["median"] == chunks - 1
    assert found["40, 8 samples"]["of dense"] == 2.0
    assert {name: called.count(name) for name in ("dense", "select", "weights", "rows_of", "blocks")} == {
        "dense": chunks, "select": 2 * chunks, "weights": 2 * (chunks - 1), "rows_of": 2 * chunks, "blocks": 2 * chunks,
    }  # fmt: skip
