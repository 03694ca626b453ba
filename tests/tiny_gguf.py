"""A tiny random Qwen2 as a GGUF file, with a byte-level tokenizer, written as llama.cpp's conversion writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPE = {
    **{"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What a parameter of transformers is called in a GGUF file.
NAMES = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    **{"model.layers": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    "mlp.down_proj": "ffn_down",
}


def write(
    path: Path, architecture: str = "qwen2", name: str = "Tiny Qwen2 (Test)", template: str = TEMPLATE, **more: Any
) -> dict[str, Any]:
    """Write the file; returns its weights, float32, by the names that transformers has for them.

    template: chat template, "" for none. more: metadata, such as split_count; `tokenizer=False` leaves that out.
    """
    import gguf
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False))
    weights = {key: value.detach() + 0.01 for key, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, architecture)
    if name:
        writer.add_name(name)
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if experts := more.get("experts"):
        writer.add_expert_count(experts)
    if parts := more.get("parts"):
        writer.add_uint16("split.count", parts)
    if more.get("tokenizer", True):
        _add_tokenizer(writer)
    if template:
        writer.add_chat_template(template)
    for key, value in weights.items() if more.get("weights", True) else ():
        for theirs, short in NAMES.items():
            key = key.replace(theirs, short)
        writer.add_tensor(key, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _add_tokenizer(writer: Any) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "he", *SPECIAL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - len(SPECIAL)) + [3] * len(SPECIAL))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 3)
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_add_bos_token(False)
