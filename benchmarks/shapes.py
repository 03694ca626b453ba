"""Shapes of well-known models, for runs with random weights: speed does not depend on what the weights are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def write(name: str, home: Path) -> Path:
    """Write the configuration of shape `name` into `home`; returns `home`, to be served as a model path.

    With `RANDOM_WEIGHTS` as engine options. Raises KeyError for a name that is not in SHAPES.
    """
    (home / "config.json").write_text(json.dumps(SHAPES[name]))
    return home


# Engine options for a directory that `write` made.
RANDOM_WEIGHTS = {"load_format": "dummy", "skip_tokenizer_init": True}
