"""The arithmetic behind the TTFT benchmark: the bound of a pruned request, its control, bytes of a decoding step."""

from __future__ import annotations

import pytest

from benchmarks.ttft.bound import Depth, bound_seconds, late_seconds, parts_seconds, step_bytes
from tests.fast.ttft_records import LLAMA


@pytest.mark.parametrize(("early", "late"), [(16, 16), (15, 15), (20, 8), (3, 2)], ids=str)
def test_bound_counts_once_what_a_request_pays_once(early: int, late: int) -> None:
    # A made-up machine: what is paid once, and a layer, both depend on the number of tokens in their own way.
    def once(tokens: int) -> float:
        return 0.003 + 1e-7 * tokens

    def layer(tokens: int) -> float:
        return 2e-7 * tokens + 1e-12 * tokens**2

    def request(layers: int, tokens: int) -> float:
        return once(tokens) + layers * layer(tokens)

    tokens, kept = 10_000, 2000
    bound = bound_seconds(request(early, tokens), request(late, kept), request(1, kept), late)
    assert bound == pytest.approx(once(tokens) + early * layer(tokens) + late * layer(kept))
    # And a dense request is the sum of its parts.
    depth = Depth(early + late, early - 1)
    parts = parts_seconds(request(early, tokens), request(1, tokens), depth)
    assert parts == pytest.approx(request(early + late, tokens))


def test_one_late_layer_has_no_bound() -> None:
    with pytest.raises(ValueError, match="earlier prune layer"):
        late_seconds(2.0, 1.0, 1)
    with pytest.raises(ValueError, match="later prune layer"):
        parts_seconds(2.0, 1.0, Depth(3, 0))


def test_depth_counts_the_prune_layer_as_early() -> None:
    assert (Depth(32, 15).early, Depth(32, 15).late) == (16, 16)
    assert (Depth(36, 20).early, Depth(36, 20).late) == (21, 15)


def test_bytes_of_a_step_counted_by_hand() -> None:
    model = {
        "hidden_size": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 5,
        "intermediate_size": 7,
        "num_hidden_layers": 3,
        "vocab_size": 11,
    }
    # q and o: 6 x 20 each; k and v: 6 x 10 each; gate, up, down: 6 x 7 each
    weights = 3 * (2 * 120 + 2 * 60 + 3 * 42) + 11 * 6
    token = 2 * 2 * 5  # key and value, 2 heads of 5
    depth = Depth(3, 0)
    assert step_bytes(model, 2, 4, 100, 10, depth, 1.0) == 2 * (weights + 4 * token * 3 * 110)
    assert step_bytes(model, 2, 4, 100, 10, depth, 0.25) == 2 * (weights + 4 * token * (110 + 2 * 35))
    assert step_bytes(model, 2, 4, 100, 10, depth, 1.0, kv_itemsize=1) == 2 * weights + 4 * token * 3 * 110


def test_bytes_of_a_step_of_llama_agree_with_what_was_measured() -> None:
    # claa-notes: 64K context, batch 8, 83 GB read per step
    assert step_bytes(LLAMA, 2, 8, 65_536, 0, Depth(32, 15), 1.0) == pytest.approx(83.5e9, rel=0.01)
