"""Tiny random models on disk, one per model family, for tests against SGLang's real model code.

Shape and weights are those of benchmarks/tiny_model.py. There is no tokenizer: serve them with
`--skip-tokenizer-init` and send `input_ids`; or take byte_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tiny_model import MAX_POSITIONS as MAX_POSITIONS
from benchmarks.tiny_model import NUM_LAYERS as NUM_LAYERS
from benchmarks.tiny_model import SHAPE, VOCAB_SIZE, llama, save

# Layers return one tensor, the residual travels in the forward batch.
CURRENT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Layers take and return (hidden_states, residual): SGLang 0.5.23 models/granite.py, models/gemma.py.
RESIDUAL_FAMILIES = ("granite", "gemma")
FAMILIES = (*CURRENT_FAMILIES, *RESIDUAL_FAMILIES)
# Not among those whose answers are compared: experts, for what records them.
EXPERTS = "qwen3_moe"
EXPERTS_PER_TOKEN = 2


def build(family: str, home: Path, seed: int = 0) -> Path:
    """The directory of the model of `family` under `home`, made unless it is there.

    Raises KeyError for a family that is not here. The same seed gives the same weights.
    """
    make = _CONFIGS[family]
    directory = home / f"tiny-{family}-{seed}"
    if directory.is_dir():
        return directory

    # Families of one architecture must not share their weights.
    return save(make(), directory, seed=1000 * seed + list(_CONFIGS).index(family))


def prompt(length: int, seed: int = 0) -> list[int]:
    """`length` random token ids, reproducible; prompts of one seed are prefixes of each other."""
    import random

    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**SHAPE, sliding_window=None)


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**SHAPE, use_sliding_window=False)


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**SHAPE, use_sliding_window=False)


def _granite() -> Any:
    from transformers import GraniteConfig

    # Multipliers other than 1, so that dropping one shows.
    scales = {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.25}
    return GraniteConfig(**SHAPE, **scales, logits_scaling=2.0)


def _gemma() -> Any:
    from transformers import GemmaConfig

    # SGLang's gemma has no output matrix of its own.
    return GemmaConfig(**{**SHAPE, "tie_word_embeddings": True}, hidden_activation="gelu_pytorch_tanh")


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": EXPERTS_PER_TOKEN, "moe_intermediate_size": 64}
    return Qwen3MoeConfig(**SHAPE, **experts, use_sliding_window=False)


_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "granite": _granite,
    "gemma": _gemma,
    EXPERTS: _qwen3_moe,
}
