"""What is read of a config.json is what the model has: held against transformers' own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from claa_sglang.plan.error import PlanError
from claa_sglang.plan.model import FAMILIES, shape_of
from claa_sglang.plan.room import last_prune_layer
from tests.fast.plan.conftest import TINY

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 512,
}
CONFIGS = [
    LlamaConfig(**SIZES, tie_word_embeddings=True),
    LlamaConfig(**SIZES, head_dim=32),
    MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    Qwen2Config(**SIZES, tie_word_embeddings=False),
    Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=True),
    GraniteConfig(**SIZES),
    GemmaConfig(**SIZES, head_dim=48),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_weights_are_those_of_the_model(config: Any) -> None:
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config.to_dict() | {"architectures": [type(made).__name__]}, "made")
    matrices = [weight for weight in made.parameters() if weight.ndim == 2]
    layer = [weight for weight in made.model.layers[0].parameters() if weight.ndim == 2]
    assert shape.layer_weights == sum(weight.numel() for weight in layer)
    assert shape.weights == sum(weight.numel() for weight in matrices)
    attention = made.model.layers[0].self_attn
    assert shape.kv_width == attention.k_proj.out_features + attention.v_proj.out_features
    assert shape.layer(2).query_width == attention.q_proj.out_features


def test_every_family_is_held_against_its_model() -> None:
    names = {config.model_type for config in CONFIGS}
    assert {family.removesuffix("ForCausalLM").lower() for family in FAMILIES} == names


def test_the_last_prune_layer_is_that_of_a_server() -> None:
    assert last_prune_layer(TINY, 2) == 26  # as README.md says of SmolLM2 in 16 bits
    assert last_prune_layer(TINY, 4) == 27


GOOD = SIZES | {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM"),
        ({"architectures": None}, "no named architecture"),
        ({"architectures": "LlamaForCausalLM"}, "no named architecture"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 1}, "from 2 up"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding-window"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding-window"),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": True}, "sliding-window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_a_model_that_is_not_reckoned_with_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        shape_of(GOOD | change, "bad")
    shape_of(GOOD, "good")


def test_a_window_that_is_not_used_is_none() -> None:
    own = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": False}
    assert shape_of(GOOD | own, "qwen").layers == 3
