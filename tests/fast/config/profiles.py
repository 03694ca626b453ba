"""A profile as a file has it, and steps of two prunes."""

PROFILE = {
    "version": 1,
    "model": {
        "num_layers": 30,
        "name": "small",
        "architecture": "LlamaForCausalLM",
        "hidden_size": 576,
        "heads": 9,
        "kv_heads": 3,
        "vocabulary": 49152,
    },
    "steps": [{"prune_layer": 19, "keep_rate": 0.3, "score_layers": [17, 18]}],
    "window": 16,
    "pool_kernel": 13,
    "ranker": "claa:paper",
    "min_prompt_tokens": 256,
    "provenance": {"text": "prose", "date": "2025-11-01"},
}
TWO_STEPS = [
    {"prune_layer": 14, "keep_rate": 0.4, "score_layers": [14]},
    {"prune_layer": 20, "keep_rate": 0.1, "score_layers": [18, 20]},
]
