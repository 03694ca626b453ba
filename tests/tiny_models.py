"""Tiny random models on disk, one per model family, for tests against SGLang's real model code.

Eight layers, four heads, two KV heads of 16, hidden size 64, 512 tokens of vocabulary, float32, seeded.
The weights are drawn wide enough that attention is peaked and every layer changes the answer; norms and
biases are random too, or a hook that skips one would go unnoticed. There is no tokenizer: serve them with
`--skip-tokenizer-init` and send `input_ids`; or take `build_with_tokenizer`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NUM_LAYERS = 8
VOCAB_SIZE = 512
MAX_POSITIONS = 8192

# Layers return one tensor, the residual travels in the forward batch.
CURRENT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Layers take and return (hidden_states, residual): SGLang 0.5.23 models/granite.py, models/gemma.py.
RESIDUAL_FAMILIES = ("granite", "gemma")
FAMILIES = (*CURRENT_FAMILIES, *RESIDUAL_FAMILIES)
# Not among those whose answers are compared: experts, for what records them.
EXPERTS = "qwen3_moe"
EXPERTS_PER_TOKEN = 2

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SHAPE: dict[str, Any] = {
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def build(family: str, home: Path, seed: int = 0) -> Path:
    """The directory of the model of `family` under `home`, made unless it is there.

    Raises KeyError for a family that is not here. The same seed gives the same weights.
    """
    make = _CONFIGS[family]
    directory = home / f"tiny-{family}-{seed}"
    if directory.is_dir():
        return directory

    # Families of one architecture must not share their weights.
    return _save(make(), directory, seed=1000 * seed + list(_CONFIGS).index(family))


def build_with_tokenizer(home: Path, tokenizer_from: Path) -> Path:
    """As `build` for a llama, with the tokenizer and chat template of the model in `tokenizer_from`.

    Its vocabulary is as large as that tokenizer's, so that text can be sent and comes back.
    """
    import json

    directory = home / f"tiny-llama-{tokenizer_from.name}"
    if directory.is_dir():
        return directory
    vocabulary = json.loads((tokenizer_from / "config.json").read_text())["vocab_size"]
    return _save(_llama(vocab_size=vocabulary), directory, seed=0, extra=[tokenizer_from / name for name in _TOKENIZER])


def _save(config: Any, directory: Path, *, seed: int, extra: Sequence[Path] = ()) -> Path:
    """Draw the weights and write the model to `directory`, with copies of the files `extra`; whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM

    temp = directory.with_name(f".{directory.name}")
    shutil.rmtree(temp, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(temp)
    for file in extra:
        shutil.copy(file, temp)
    temp.rename(directory)
    return directory


def prompt(length: int, seed: int = 0) -> list[int]:
    """`length` random token ids, reproducible; prompts of one seed are prefixes of each other."""
    import random

    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


def _llama(**changed: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**_SHAPE, **changed})


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_SHAPE, sliding_window=None)


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_SHAPE, use_sliding_window=False)


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_SHAPE, use_sliding_window=False)


def _granite() -> Any:
    from transformers import GraniteConfig

    # Multipliers other than 1, so that dropping one shows.
    scales = {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.25}
    return GraniteConfig(**_SHAPE, **scales, logits_scaling=2.0)


def _gemma() -> Any:
    from transformers import GemmaConfig

    # SGLang's gemma has no output matrix of its own.
    return GemmaConfig(**{**_SHAPE, "tie_word_embeddings": True}, hidden_activation="gelu_pytorch_tanh")


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": EXPERTS_PER_TOKEN, "moe_intermediate_size": 64}
    return Qwen3MoeConfig(**_SHAPE, **experts, use_sliding_window=False)


_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "granite": _granite,
    "gemma": _gemma,
    EXPERTS: _qwen3_moe,
}
