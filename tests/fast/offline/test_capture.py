"""Observation, study and oracle against a model's own attention weights (`output_attentions` of eager attention)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from claa_sglang.offline import capture, oracle, spec_prefill, study
from claa_sglang.offline.capture import CaptureError
from claa_sglang.ranking import rankers, selection, spec
from tests import tiny_models

WINDOW, ANSWER = 8, 5
TOKENS = 61


def _load(family: str, home: Path, attention: str, seed: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    directory = tiny_models.build(family, home, seed)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(home: Path) -> Any:
    return _load("llama", home, "sdpa")


def _ids(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.tensor(tiny_models.prompt(tokens, seed))


class Truth:
    """The greedy answer and all attention weights of prompt and answer, from one eager forward over both."""

    def __init__(self, model: Any, ids: torch.Tensor, answer_tokens: int) -> None:
        self.prompt = ids.numel()
        with torch.no_grad():
            for _ in range(answer_tokens):
                ids = torch.cat((ids, model(ids[None]).logits[0, -1].argmax()[None]))
            out = model(ids[None, :-1], output_attentions=True)
        self.answer = tuple(ids[self.prompt :].tolist())
        self.attentions = [layer[0].double() for layer in out.attentions]  # each [heads, N + T - 1, N + T - 1]

    def oracle(self, kernel: int = 13) -> list[float]:
        """As in claa-notes: prompt keys only, max over heads and layers, mean over steps, average pool."""
        n, mean = self.prompt, [0.0] * self.prompt
        steps = range(n - 1, n - 1 + len(self.answer))
        for step in steps:
            best = [0.0] * n
            for layer in self.attentions:
                for head in layer:
                    row = head[step, :n].tolist()
                    total = math.fsum(row)  # softmax over prompt keys alone is the renormalised row
                    best = [max(old, value / total) for old, value in zip(best, row, strict=True)]
            mean = [old + value / len(steps) for old, value in zip(mean, best, strict=True)]
        half = kernel // 2
        return [math.fsum(mean[max(0, i - half) : i + half + 1]) / kernel for i in range(n)]

    def mass(self, queries: int, kv_heads: int) -> torch.Tensor:
        """fp64 [L, kv_heads, N-W]: what the last `queries` prompt rows give to the tokens before the window."""
        n = self.prompt
        rows = torch.stack([layer[:, n - queries : n, : n - WINDOW].sum(dim=1) for layer in self.attentions])
        return rows.unflatten(1, (kv_heads, -1)).sum(dim=2)

    def peak(self, window: int, kv_heads: int) -> torch.Tensor:
        """fp64 [L, kv_heads, N-window]: the most that any of the last `window` prompt rows gives."""
        n = self.prompt
        rows = torch.stack([layer[:, n - window : n, : n - window].amax(dim=1) for layer in self.attentions])
        return rows.unflatten(1, (kv_heads, -1)).amax(dim=2)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_study_is_the_models_own_attention(family: str, home: Path) -> None:
    model, ids = _load(family, home, "sdpa"), _ids()
    truth = Truth(_load(family, home, "eager"), ids, ANSWER)
    made = study.study(model, ids, window=WINDOW, max_answer_tokens=ANSWER)
    assert made.answer == truth.answer
    close = {"rtol": 1e-3, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(made.statistics["window_peak"], truth.peak(WINDOW, kv_heads=2), **close)
    torch.testing.assert_close(made.statistics["window_mass"], truth.mass(WINDOW, kv_heads=2), **close)
    torch.testing.assert_close(made.statistics["last_mass"], truth.mass(1, kv_heads=2), **close)
    torch.testing.assert_close(made.oracle, torch.tensor(truth.oracle()), **close)
    # Of a wider window all queries look for a peak, and the last 8 for a mass.
    wider = study.study(model, ids, window=16, max_answer_tokens=1).statistics
    torch.testing.assert_close(wider["window_peak"], truth.peak(16, kv_heads=2), **close)
    torch.testing.assert_close(wider["window_mass"], truth.mass(8, kv_heads=2)[..., : TOKENS - 16], **close)
    mass = made.statistics["window_mass"]
    assert (mass.amax(dim=-1) > 1.5 * mass.mean(dim=-1)).all()  # attention has peaks; flat it would prove little
    assert (made.tokens, made.window, made.layers) == (TOKENS, WINDOW, tiny_models.NUM_LAYERS)


def test_a_study_ranks_as_the_server_does(llama: Any) -> None:
    """The same queries and keys, through `score_layer`, as TorchScorer has them."""
    ids, seen = _ids(), []
    made = study.study(llama, ids, window=WINDOW, max_answer_tokens=1)
    capture.greedy_answer(
        llama, ids, lambda layer, q, k, scaling: seen.append((q.clone(), k.clone(), scaling)), max_answer_tokens=1
    )
    for name in ["claa", "claa:paper", "claa:zscore=off,pool=after", "last-query", "fastkv", "gemfilter", "uniform"]:
        ranker = rankers.make(spec.parse(name))
        scores = [ranker.score_layer(q[-WINDOW:], k, scaling=scaling) for q, k, scaling in seen[2:5]]
        assert torch.equal(made.rank(ranker, [2, 3, 4]), ranker.rank(scores)), name


def test_the_oracles_own_record_holds_the_same_as_the_study(llama: Any, tmp_path: Path) -> None:
    ids = _ids()
    made = oracle.answer_informed(llama, ids, max_answer_tokens=ANSWER)
    assert torch.equal(made.importance, study.study(llama, ids, max_answer_tokens=ANSWER).oracle)
    made.save(tmp_path / "one")
    read = oracle.load(tmp_path / "one", llama, ids, max_answer_tokens=ANSWER)
    assert read.answer == made.answer and torch.equal(read.importance, made.importance) and read.about == made.about


def test_an_answer_stops_at_the_end_token_which_is_one_more_step(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, steps = _ids(), []
    full = study.study(llama, ids, max_answer_tokens=4).answer
    cut = next(i for i in range(1, 4) if full[i] not in full[:i])
    monkeypatch.setattr(llama.generation_config, "eos_token_id", [511, full[cut]])
    answer = capture.greedy_answer(
        llama, ids, lambda layer, q, k, s: steps.append((layer, q.shape[0], k.shape[0])), max_answer_tokens=4
    )
    assert answer == full[:cut]
    per_layer = [TOKENS] + [1] * cut
    assert [rows for layer, rows, _ in steps if layer == 7] == per_layer
    assert [keys for layer, _, keys in steps if layer == 0] == [TOKENS + i for i in range(cut + 1)]


def test_spec_prefill_is_the_drafts_attention_pooled_first_then_by_chunk(home: Path, llama: Any) -> None:
    ids = _ids()
    truth = Truth(_load("llama", home, "eager"), ids, 3)
    n, steps = TOKENS, range(TOKENS - 1, TOKENS + 2)
    rows = torch.stack([layer[:, list(steps), :n] for layer in truth.attentions])  # [L, heads, steps, N]
    rows = rows / rows.sum(dim=-1, keepdim=True)
    padded = torch.nn.functional.pad(rows, (6, 6))
    pooled = padded.unfold(-1, 13, 1).mean(dim=-1)
    expected = pooled.amax(dim=(0, 1)).mean(dim=0)
    fine = spec_prefill.importance(llama, ids, look_ahead=3, chunk=1)
    torch.testing.assert_close(fine, expected, rtol=1e-3, atol=1e-6, check_dtype=False)
    coarse = spec_prefill.importance(llama, ids, look_ahead=3)
    assert coarse.unique().numel() == 2 and coarse[:32].unique().numel() == 1
    torch.testing.assert_close(coarse[[0, -1]], torch.stack((fine[:32].mean(), fine[32:].mean())))
    kept = selection.select(coarse[: n - WINDOW], n, WINDOW + 5, WINDOW)
    assert kept[:5].tolist() == list(range(kept[0], kept[0] + 5))


def test_the_model_is_as_before_and_nesting_is_refused(home: Path) -> None:
    model, ids = _load("llama", home, "eager"), _ids()
    before = model(ids[None]).logits
    with capture.observing(model, lambda *seen: None):
        with pytest.raises(CaptureError, match="observed already"), capture.observing(model, lambda *seen: None):
            pass
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids[None]).logits, before)


def test_what_cannot_be_studied_is_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaptureError, match="longer one"):
        study.study(llama, _ids(8), window=8)
    with pytest.raises(CaptureError, match="token ids"):
        capture.greedy_answer(llama, _ids()[None], lambda *seen: None, max_answer_tokens=1)
    with capture.observing(llama, lambda *seen: None), pytest.raises(CaptureError, match="a batch of 2"):
        llama(torch.stack((_ids(), _ids())))
    with capture.observing(llama, lambda *seen: None), pytest.raises(CaptureError, match="sliding_window"):
        llama(_ids()[None], sliding_window=16)


def test_the_models_own_scaling_is_used(home: Path) -> None:
    """Granite's multiplier need not be d ** -0.5, though that of the tiny one happens to be."""
    model, seen = _load("granite", home, "sdpa"), set()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7
    capture.greedy_answer(model, _ids(), lambda layer, q, k, scaling: seen.add(scaling), max_answer_tokens=1)
    assert seen == {0.7}
    q, k = torch.ones(1, 1), torch.tensor([0.0, 1.0]).view(2, 1, 1)
    torch.testing.assert_close(oracle.prompt_attention(q, k, scaling=0.7)[0, 1].item(), 1 / (1 + math.exp(-0.7)))


class _Vocabulary(dict):
    def get_vocab(self) -> dict:
        return self


def test_a_draft_with_another_tokenizer_is_refused() -> None:
    ours = _Vocabulary(a=0, b=1)
    spec_prefill.require_same_tokenizer(_Vocabulary(a=0, b=1), ours)
    for other in (_Vocabulary(a=1, b=0), _Vocabulary(a=0), _Vocabulary(a=0, b=1, c=2)):
        with pytest.raises(CaptureError, match="same family"):
            spec_prefill.require_same_tokenizer(other, ours)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_memory_does_not_grow_with_the_square_of_the_prompt(llama: Any) -> None:
    largest = {}
    for tokens in (1024, 2048):
        with Largest() as mode:
            study.study(llama, _ids(tokens), max_answer_tokens=2)
        largest[tokens] = mode.elements
    assert largest[2048] <= 2 * largest[1024]
    assert largest[2048] <= 2048 * 128  # activations of the MLP; one head's [N, N] would be 16 times that
