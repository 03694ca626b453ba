"""The ranking against a transformers model's own attention weights, computed in numpy with no shared code.

A tiny random Llama with grouped queries returns the softmax it used (`output_attentions`); the queries and
keys it used, after RoPE, are seen on their way into its eager attention function.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from claa_sglang.config.budget import kept_count
from claa_sglang.kernels import naive, scoring
from claa_sglang.ranking import selection

WINDOW, POOL, HEADS, KV_HEADS, DIM, LAYERS = 8, 7, 6, 2, 16, 3
LENGTHS = [1, 7, 8, 9, 80, 1025]
LONGER_THAN_WINDOW = [n for n in LENGTHS if n > WINDOW]


class Seen(NamedTuple):
    q: list[torch.Tensor]  # per layer [N, heads, d], after RoPE
    k: list[torch.Tensor]  # per layer [N, kv_heads, d], after RoPE
    scaling: float
    attentions: list[np.ndarray]  # per layer [heads, N, N]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=HEADS * DIM,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        initializer_range=0.15,  # attention with peaks; at the usual 0.02 it is flat and would hide errors
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).float().eval()


def _run(model: LlamaForCausalLM, tokens: int, monkeypatch: pytest.MonkeyPatch) -> Seen:
    q: list[torch.Tensor] = []
    k: list[torch.Tensor] = []
    scalings: list[float] = []
    original = modeling_llama.eager_attention_forward

    def spy(module, query, key, value, attention_mask, scaling, **kwargs):
        q.append(query[0].transpose(0, 1).clone())
        k.append(key[0].transpose(0, 1).clone())
        scalings.append(scaling)
        return original(module, query, key, value, attention_mask, scaling, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", spy)
    ids = torch.randint(0, 97, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    assert len(q) == LAYERS and q[0].shape == (tokens, HEADS, DIM) and k[0].shape == (tokens, KV_HEADS, DIM)
    return Seen(q, k, scalings[0], [layer[0].double().numpy() for layer in out.attentions])


def _scores_from_attention(attention: np.ndarray) -> np.ndarray:
    """Steps 2 to 4 on [heads, N, N] attention weights, in the order the authors' code has them."""
    mass = attention[:, -WINDOW:, :].sum(axis=1)[:, :-WINDOW]
    padded = np.pad(mass, ((0, 0), (POOL // 2, POOL // 2)))
    pooled = np.lib.stride_tricks.sliding_window_view(padded, POOL, axis=1).mean(axis=2)
    return np.stack([group.sum(axis=0) for group in np.split(pooled, KV_HEADS)])


def _ranking_from_attention(attentions: list[np.ndarray]) -> np.ndarray:
    rows = np.concatenate([_scores_from_attention(attention) for attention in attentions])
    if rows.shape[1] == 1:
        return np.zeros(1)
    return ((rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + 1e-8)).max(axis=0)


@pytest.mark.parametrize("tokens", LONGER_THAN_WINDOW, ids="N{}".format)
@pytest.mark.parametrize("module", [naive, scoring], ids=["naive", "fast"])
def test_scores_are_the_models_own_attention(module, tokens: int, model, monkeypatch) -> None:
    seen = _run(model, tokens, monkeypatch)
    for q, k, attention in zip(seen.q, seen.k, seen.attentions, strict=True):
        got = module.window_scores(q[-WINDOW:], k, scaling=seen.scaling, pool_kernel=POOL)
        expected = torch.from_numpy(_scores_from_attention(attention)).float()
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", LONGER_THAN_WINDOW, ids="N{}".format)
@pytest.mark.parametrize("module", [naive, scoring], ids=["naive", "fast"])
def test_peaks_are_the_models_own_attention(module, tokens: int, model, monkeypatch) -> None:
    seen = _run(model, tokens, monkeypatch)
    for q, k, attention in zip(seen.q, seen.k, seen.attentions, strict=True):
        got = module.window_peaks(q[-WINDOW:], k, scaling=seen.scaling)
        weights = attention[:, -WINDOW:, :-WINDOW].reshape(KV_HEADS, -1, tokens - WINDOW)
        torch.testing.assert_close(got, torch.from_numpy(weights.max(axis=1)).float(), rtol=2e-4, atol=1e-6)


def test_the_model_is_a_fair_judge(model, monkeypatch) -> None:
    """Its attention has peaks and its KV heads disagree; otherwise the comparison would prove little."""
    seen = _run(model, 1025, monkeypatch)
    for attention in seen.attentions:
        scores = _scores_from_attention(attention)
        assert (scores.max(axis=1) > 2.5 * scores.mean(axis=1)).all()
        assert np.corrcoef(scores)[0, 1] < 0.9


@pytest.mark.parametrize("tokens", LENGTHS, ids="N{}".format)
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_selection_holds_the_window_and_the_best(tokens: int, rate: float, model, monkeypatch) -> None:
    seen = _run(model, tokens, monkeypatch)
    kept = kept_count(tokens, rate, WINDOW)
    ranks = torch.empty(0)
    if tokens > WINDOW:
        ranks = selection.rank(
            [
                scoring.window_scores(q[-WINDOW:], k, scaling=seen.scaling, pool_kernel=POOL)
                for q, k in zip(seen.q, seen.k, strict=True)
            ]
        )
    positions = selection.select(ranks, tokens, kept, WINDOW).tolist()
    assert len(positions) == kept == max(int(rate * tokens), min(WINDOW, tokens))
    assert positions == sorted(set(positions))
    assert set(range(max(0, tokens - WINDOW), tokens)) <= set(positions)
    if tokens <= WINDOW:
        assert positions == list(range(tokens))
        return
    expected = _ranking_from_attention(seen.attentions)
    torch.testing.assert_close(ranks, torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-3)
    assert (positions[0] == 0) == (kept > WINDOW)
    # The first token is kept whatever its rank.
    chosen = [position for position in positions if 0 < position < tokens - WINDOW]
    left = np.delete(expected, [0, *chosen])
    # Rounding may swap neighbours at the edge of the budget, nothing more.
    assert not chosen or not left.size or expected[chosen].min() >= left.max() - 1e-3
