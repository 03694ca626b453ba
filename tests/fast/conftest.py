"""What several files of fast tests need."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 8 layers: its config.json, no weights."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("llama")
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    LlamaConfig(**shape, num_attention_heads=4, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    return str(directory)
