"""A tiny random llama, for benchmarks and tests against SGLang's real model code.

Eight layers, four heads, two KV heads of 16, hidden size 64, 512 tokens of vocabulary, float32, seeded.
The weights are drawn wide enough that attention is peaked and every layer changes the answer; norms and
biases are random too, or a hook that skips one would go unnoticed. It has no tokenizer of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_LAYERS = 8
VOCAB_SIZE = 512
MAX_POSITIONS = 8192

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHAPE: dict[str, Any] = {
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


def build_with_tokenizer(home: Path, tokenizer_from: Path) -> Path:
    """The directory of the llama under `home`, made unless it is there.

    It has the tokenizer and chat template of the model in `tokenizer_from`, and a vocabulary as large as that
    tokenizer's, so that text can be sent and comes back.
    """
    directory = home / f"tiny-llama-{tokenizer_from.name}"
    if directory.is_dir():
        return directory
    vocabulary = json.loads((tokenizer_from / "config.json").read_text())["vocab_size"]
    return save(llama(vocab_size=vocabulary), directory, seed=0, extra=[tokenizer_from / name for name in _TOKENIZER])


def save(config: Any, directory: Path, *, seed: int, extra: Sequence[Path] = ()) -> Path:
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


def llama(**changed: Any) -> Any:
    """Its configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**SHAPE, **changed})
