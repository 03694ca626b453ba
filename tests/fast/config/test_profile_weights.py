"""One checkpoint has one set of hashes, however it is loaded, and another checkpoint has others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from claa_sglang.config import profile_weights
from claa_sglang.config.profile_search import SHIPPED
from claa_sglang.config.profile_weights import KEY, different, of_checkpoint, stated, written
from tests import tiny_models

WHAT = {"embedding", "q", "o", "down"}


def load(path: Path, dtype: str = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_both_loads_of_a_checkpoint_agree_and_another_checkpoint_differs(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    path = tiny_model(family)
    samples = of_checkpoint(load(path))
    assert set(samples) == WHAT and len(set(samples.values())) == len(WHAT)
    assert of_checkpoint(load(path, "bfloat16")) == samples
    assert set(different(samples, of_checkpoint(load(tiny_models.build(family, tmp_path, seed=1)))) or ()) == WHAT


@pytest.mark.parametrize("what", ["q", "o", "down"])
@pytest.mark.parametrize("layer", [0, 4, 7])
def test_a_fine_tune_of_one_matrix_of_a_sampled_layer_is_seen(
    tiny_model: Callable[[str], Path], what: str, layer: int
) -> None:
    model = load(tiny_model("llama"))
    before = of_checkpoint(model)
    name = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "down": "mlp.down_proj"}[what]
    weight = model.get_parameter(f"model.layers.{layer}.{name}.weight")
    with torch.no_grad():
        weight.add_(0.05 * weight.abs())
    assert different(before, of_checkpoint(model)) == [what]


def test_what_cannot_be_compared_is_left_out(tiny_model: Callable[[str], Path]) -> None:
    assert of_checkpoint(load(tiny_model("llama"), "float16")) == {}
    assert set(of_checkpoint(load(tiny_model(tiny_models.EXPERTS)))) == WHAT - {"down"}
    assert profile_weights.sample(lambda name: None, 8) == {}
    assert different({"q": "a"}, {}) is None and different({"q": "a", "o": "b"}, {"q": "a"}) == []


def test_provenance_comes_back_and_a_later_kind_of_sample_is_not_compared(tiny_model: Callable[[str], Path]) -> None:
    samples = of_checkpoint(load(tiny_model("llama")))
    assert stated({KEY: written(samples)}) == samples
    assert stated({}) is None and stated({KEY: "some other text"}) is None
    more = {**samples, "gate": "0" * 16}
    assert stated({KEY: written(more)}) == more and different(more, samples) == []


def test_the_shipped_profile_is_of_the_model_that_is_prepared(small_model_path: Path) -> None:
    import msgspec

    provenance = msgspec.json.decode((SHIPPED / "smollm2-135m-instruct.json").read_bytes())["provenance"]
    assert stated(provenance) == of_checkpoint(load(small_model_path))
