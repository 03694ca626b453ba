"""Each refusal, on SGLang's real ServerArgs and ModelConfig of tiny models, resolved on the CPU.

A few options cannot be resolved without a GPU, another package or a special model: SGLang itself refuses them here.
Those cases say so with `stated`: a record that did resolve, read through SGLang's own ResolvedView with the option on
top, which is what a machine that has those things would see.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers as hf
from sglang.srt.arg_groups.model_override_base import ResolvedView
from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

from claa_sglang.arguments import ClaaServerArgs
from claa_sglang.config import refusals
from claa_sglang.requests.body import wrong_defaults

WINDOW = 8
CPU = {"device": "cpu", "attention_backend": "torch_native"}
CUDA = {"device": "cuda", "attention_backend": "fa3", "disable_cuda_graph": True}
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "image_size": 28,
    "patch_size": 14,
}


class Case(NamedTuple):
    """`rule` must be among the violations of a server with these arguments, model, environment and `stated` values."""

    rule: str
    args: dict[str, Any] = {}
    model: str = "llama"
    environ: dict[str, str] = {}
    stated: dict[str, Any] = {}
    over_kept: bool = False
    observes: bool = False
    explains: bool = False
    shadows: bool = False

    def __str__(self) -> str:
        detail = {**self.args, **self.stated, **self.environ}
        return "-".join([self.rule, self.model, *detail])


def _mla() -> hf.PretrainedConfig:
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    heads = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    return hf.DeepseekV2Config(**{**SHAPE, "num_key_value_heads": 4}, **moe, **heads)


def _mllama() -> hf.PretrainedConfig:
    vision = {**VISION, "attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0]}
    return hf.MllamaConfig(text_config={**SHAPE, "cross_attention_layers": [1]}, vision_config=vision)


def _gemma3n() -> hf.PretrainedConfig:
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512}
    shape = {**SHAPE, "intermediate_size": [128] * 4, "layer_types": ["full_attention"] * 4}
    return hf.Gemma3nTextConfig(**shape, **per_layer, head_dim=16, num_kv_shared_layers=2)


FP8_KV = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
INT8_KV = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "int"}}
FP4_KV = {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}}
MODELOPT = {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
MODELS: dict[str, tuple[str, Callable[[], hf.PretrainedConfig]]] = {
    "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**SHAPE)),
    "mistral": ("MistralForCausalLM", lambda: hf.MistralConfig(**SHAPE)),
    "qwen2": ("Qwen2ForCausalLM", lambda: hf.Qwen2Config(**SHAPE)),
    "qwen3": ("Qwen3ForCausalLM", lambda: hf.Qwen3Config(**SHAPE, head_dim=16)),
    "mixtral": ("MixtralForCausalLM", lambda: hf.MixtralConfig(**SHAPE, num_local_experts=4)),
    "granite": ("GraniteForCausalLM", lambda: hf.GraniteConfig(**SHAPE)),
    "gemma": ("GemmaForCausalLM", lambda: hf.GemmaConfig(**SHAPE, head_dim=16)),
    "deepseek2": ("DeepseekV2ForCausalLM", _mla),
    "gemma2": ("Gemma2ForCausalLM", lambda: hf.Gemma2Config(**SHAPE, head_dim=16, sliding_window=64)),
    "gemma3": ("Gemma3ForCausalLM", lambda: hf.Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=64)),
    "gemma3n": ("Gemma3nForCausalLM", _gemma3n),
    "gpt-oss": (
        "GptOssForCausalLM",
        lambda: hf.GptOssConfig(**SHAPE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=64),
    ),
    "llama4": ("Llama4ForCausalLM", lambda: hf.Llama4TextConfig(**SHAPE, head_dim=16, attention_chunk_size=64)),
    "qwen2-windowed": (
        "Qwen2ForCausalLM",
        lambda: hf.Qwen2Config(**SHAPE, use_sliding_window=True, max_window_layers=2, sliding_window=64),
    ),
    "falcon-mamba": (
        "FalconMambaForCausalLM",
        lambda: hf.FalconMambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=4, state_size=8),
    ),
    "lfm2": ("Lfm2ForCausalLM", lambda: hf.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"] * 2)),
    "qwen3-embedding": ("Qwen3Model", lambda: hf.Qwen3Config(**SHAPE, head_dim=16)),
    "llama-reward": ("LlamaForSequenceClassification", lambda: hf.LlamaConfig(**SHAPE)),
    "llava": (
        "LlavaForConditionalGeneration",
        lambda: hf.LlavaConfig(text_config=hf.LlamaConfig(**SHAPE), vision_config=hf.CLIPVisionConfig(**VISION)),
    ),
    "mllama": ("MllamaForConditionalGeneration", _mllama),
    "llama-v8": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**SHAPE, head_dim=16, v_head_dim=8)),
    "llama-fp8-kv": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**SHAPE, quantization_config=FP8_KV)),
    "llama-int8-kv": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**SHAPE, quantization_config=INT8_KV)),
    "llama-modelopt-fp4-kv": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**SHAPE, quantization_config=FP4_KV)),
    "llama-modelopt": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**SHAPE, quantization_config=MODELOPT)),
}
TP2 = {"tp_size": 2}
BAD_DEFAULT: dict[str, Any] = {"custom_params": {"claa": {"keep_rate": 7}}}
CASES = (
    Case("speculative-decoding", {"speculative_algorithm": "NGRAM"}),
    Case("disaggregation", {"disaggregation_mode": "prefill"}),
    Case("disaggregation", {"disaggregation_mode": "decode"}),
    Case("disaggregation", {"enable_pdmux": True}),
    Case("disaggregation", {"enable_pd_role_switch": True}),
    # Only for certain multimodal models.
    Case("disaggregation", stated={"encoder_only": True}),
    Case("disaggregation", stated={"language_only": True}),
    # Only with a decoupled drafter that answers.
    Case("disaggregation", stated={"decoupled_spec_role": "verifier"}),
    Case("two-batch-overlap", {"enable_two_batch_overlap": True}),
    Case("two-batch-overlap", {"enable_single_batch_overlap": True}),
    # Only for diffusion models.
    Case("dllm", stated={"dllm_algorithm": "LowConfidence"}),
    Case("multi-item-scoring", {**CUDA, "attention_backend": "flashinfer", "enable_mis": True}),
    Case("streaming-session", {"enable_streaming_session": True}),
    Case("streaming-session", {"enable_session_radix_cache": True}),
    Case("chunk-below-window", {"chunked_prefill_size": WINDOW - 1}),
    Case("chunk-below-window", {"chunked_prefill_size": 64, "page_size": 64}),
    # Only with an embedding model on a GPU.
    Case("prefill-only", stated={"prefill_only_disable_kv_cache": True}),
    Case("pipeline-parallel", {"pp_size": 2}),
    # Each would have half of a KV head.
    Case("tensor-parallel-heads", {"tp_size": 4}),
    # Only for certain models, or with kernels for experts.
    Case("sharded-rows", stated={"enable_layernorm_sp": True}),
    Case("sharded-rows", stated={"enable_attn_tp_input_scattered": True}),
    Case("sharded-rows", stated={**TP2, "moe_a2a_backend": "deepep"}),
    Case("sharded-rows", stated={**TP2, "moe_dense_tp_size": 1}),
    Case("attention-data-parallel", {**TP2, "attn_dp_size": 2}),
    Case("attention-data-parallel", {**TP2, "dp_size": 2, "enable_dp_attention": True}),
    Case("context-parallel", {**TP2, "dcp_size": 2}),
    # Prefill context parallelism needs a GPU.
    Case("context-parallel", stated={"attn_cp_size": 2}),
    Case("context-parallel", stated={"enable_prefill_cp": True}),
    Case("context-parallel", stated={"enable_dsa_cache_layer_split": True}),
    Case("multi-node", {**TP2, "nnodes": 2, "dist_init_addr": "127.0.0.1:1"}),
    Case("ray", {"use_ray": True}),
    # SGLang itself refuses it beside torch_native.
    Case("deterministic-inference", {**CUDA, "enable_deterministic_inference": True}),
    Case(
        "deterministic-inference", {**CUDA, "attention_backend": "flashinfer", "enable_deterministic_inference": True}
    ),
    Case("deterministic-inference", {**CUDA, "rl_on_policy_target": "fsdp"}),
    Case("rust-server", environ={"SGLANG_RUST_SERVER": "1"}),
    Case("grpc-server", {"smg_grpc_mode": True}),
    Case("grpc-server", {"grpc_mode": True}),
    Case("grpc-server", environ={"SMG_SGLANG_ZMQ_HANDSHAKE": "tcp://127.0.0.1:1"}),
    Case("preferred-sampling-params", {"preferred_sampling_params": BAD_DEFAULT}),
    Case("preferred-sampling-params", {"preferred_sampling_params": json.dumps(BAD_DEFAULT)}),
    Case("preferred-sampling-params", stated={"preferred_sampling_params": [1]}),
    Case("hierarchical-cache", {"enable_hierarchical_cache": True}),
    Case("hierarchical-cache", {"hicache_storage_backend": "file"}),
    Case("hierarchical-cache", {"enable_lmcache": True}),
    Case("hierarchical-cache", {"enable_flexkv": True}),
    Case("hierarchical-cache", {"enable_unified_cache_external_linker": True}),
    Case("radix-cache-backend", {"radix_cache_backend": "flexkv"}),
    Case("kv-events", {"kv_events_config": '{"publisher": "zmq", "topic": "kv"}'}),
    Case("kv-events", {"kv_events_config": '{"publisher": "zmq", "format": "dynamo"}'}),
    Case("hisparse", {"enable_hisparse": True}),
    # Only on a prefill worker with several GPUs.
    Case("kv-sharding", stated={"enable_kv_cache_sharding": True}),
    # Only for hybrid models on a GPU.
    Case("unified-memory", stated={"enable_unified_memory": True}),
    Case("unified-memory", stated={"enable_page_major_kv_layout": True}),
    Case("page-size", {**CUDA, "attention_backend": "flashinfer", "page_size": 16}),
    Case("fp8-kv", {**CUDA, "kv_cache_dtype": "fp8_e4m3"}),
    Case("fp8-kv", CUDA, model="llama-modelopt"),
    Case("decode-over-kept", {"page_size": 16}, over_kept=True),
    Case("decode-over-kept", {**CUDA, "attention_backend": "flashinfer"}, over_kept=True),
    Case("observe", {"tp_size": 2}, observes=True),
    Case("observe", CUDA, observes=True),
    Case("explain", {"tp_size": 2}, explains=True),
    Case("shadow-workers", {"tokenizer_worker_num": 2}, shadows=True),
    Case("kv-dtype", {"kv_cache_dtype": "fp8_e5m2"}),
    Case("kv-dtype", {"kv_cache_dtype": "bf16", "dtype": "float32"}),
    Case("kv-dtype", model="llama-int8-kv"),
    Case("kv-dtype", model="llama-modelopt-fp4-kv"),
    Case("memory-saver", {"enable_memory_saver": True}),
    Case("weight-offload", {"cpu_offload_gb": 1}),
    Case("weight-offload", {"offload_group_size": 2}),
    Case("weight-offload", {"ple_offload_embedding": True}),
    Case("kv-canary", {"kv_canary": "log"}),
    Case("lora", {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}),
    Case("lora", {"lora_paths": ["adapter=/nowhere"]}),
    Case("torch-compile", {"enable_torch_compile": True}),
    # Only with NVIDIA's or AMD's own kernel package.
    Case("fused-model-kernel", stated={"enable_nvidia_megakernel": True}),
    Case("fused-model-kernel", stated={"enable_amd_monokernel": True}),
    Case("prefill-cuda-graph-full", {**CUDA, "disable_cuda_graph": False, "cuda_graph_backend_prefill": "full"}),
    Case(
        "decode-cuda-graph-breakable", {**CUDA, "disable_cuda_graph": False, "cuda_graph_backend_decode": "breakable"}
    ),
    Case("hidden-states", {"enable_return_hidden_states": True}),
    Case("hidden-states", {"return_hidden_states_mode": "last"}),
    Case("hidden-states", {"enable_return_aux_hidden_states": True, "speculative_algorithm": "EAGLE3"}),
    Case("routed-experts", {"enable_return_routed_experts": True}),
    Case("routed-experts", {"enable_return_indexer_topk": True}),
    Case("routed-experts", {"expert_distribution_recorder_mode": "per_token"}),
    Case("attention-backend", {**CUDA, "attention_backend": "flex_attention"}),
    # Resolving for another device needs that device.
    Case("device", stated={"device": "xpu"}),
    # CLAA's own flags are refused where it is off, as it is here.
    Case("scorer-on-cpu", stated={"claa_scorer": "triton"}),
    Case("scorer-on-cpu", stated={"claa_scorer": "flashinfer"}),
    Case("embedding-model", {"is_embedding": True}),
    Case("embedding-model", model="qwen3-embedding"),
    Case("embedding-model", model="llama-reward"),
    Case("multimodal", model="llava"),
    Case("encoder-decoder", model="mllama"),
    Case("mla", model="deepseek2"),
    Case("sliding-window", model="gemma2"),
    Case("sliding-window", model="gemma3"),
    Case("sliding-window", model="llama4"),
    Case("sliding-window", model="qwen2-windowed"),
    Case("sliding-window", CUDA, model="gpt-oss"),
    Case("attention-sinks", CUDA, model="gpt-oss"),
    Case("linear-attention", model="falcon-mamba"),
    Case("linear-attention", model="lfm2"),
    Case("shared-kv", model="gemma3n"),
    Case("different-key-value-size", model="llama-v8"),
    Case("model-family", model="gemma3"),
    Case("model-family", model="gemma3n"),
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory with the config.json of a tiny model: real configurations, no weights."""
    home = tmp_path_factory.mktemp("models")

    def write(name: str) -> Path:
        directory = home / name
        if not directory.exists():
            architecture, make = MODELS[name]
            config = make()
            config.architectures = [architecture]
            config.save_pretrained(directory)
        return directory

    return write


def resolved(path: Path, args: dict[str, Any]) -> Any:
    """Real arguments, resolved as SGLang does for a server; the flag is off, so that nothing is refused yet."""
    record = ClaaServerArgs(model_path=str(path), load_format="dummy", skip_tokenizer_init=True, **{**CPU, **args})
    record.resolve_once()
    return record


def violations(case: Case, path: Path) -> list[str]:
    record = resolved(path, case.args)
    view = resolved_view(record) if not case.stated else ResolvedView(record, overlay=case.stated)
    wrong = wrong_defaults(view.preferred_sampling_params)
    model = model_config_of(record)
    asked = case.over_kept, case.observes, case.explains, case.shadows
    return [rule.id for rule in refusals.violated(view, model, WINDOW, case.environ, wrong, *asked)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_violation_is_seen(case: Case, model_path: Callable[[str], Path]) -> None:
    assert case.rule in violations(case, model_path(case.model))


# Options that speak for themselves: they, and only their rule, are refused.
SINGLE = [case for case in CASES if case.model == "llama" and case.rule not in ("prefill-cuda-graph-full",)]


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_no_other_rule_fires(case: Case, model_path: Callable[[str], Path]) -> None:
    found = violations(case, model_path(case.model))
    assert set(found) <= {case.rule}


@pytest.mark.parametrize("model", ["llama-fp8-kv", "llama-modelopt"])
def test_checkpoints_that_record_fp8_kv_violate_nothing(model: str, model_path: Callable[[str], Path]) -> None:
    triton = {**CUDA, "attention_backend": "triton"}
    assert violations(Case("", triton, model=model), model_path(model)) == []


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "granite", "gemma"])
def test_supported_families_violate_nothing(model: str, model_path: Callable[[str], Path]) -> None:
    assert violations(Case("", model=model), model_path(model)) == []
    assert violations(Case("", TP2, model=model), model_path(model)) == []


PLAIN = (
    {"disable_radix_cache": True},
    {"chunked_prefill_size": -1},
    {"chunked_prefill_size": WINDOW},
    {"enable_mixed_chunk": True},
    {"dp_size": 2},
    {"kv_cache_dtype": "bf16", "dtype": "bfloat16"},
    {"disable_overlap_schedule": True},
    {"enable_metrics": True},
    {"expert_distribution_recorder_mode": "stat"},
    {"debug_tensor_dump_output_folder": "/nowhere"},
    CUDA,
    {**CUDA, "attention_backend": "flashinfer"},
    {**CUDA, "attention_backend": "triton"},
    {**CUDA, "attention_backend": "triton", "page_size": 16, "kv_cache_dtype": "fp8_e4m3"},
    {**CUDA, "page_size": 64},
    {**CUDA, "prefill_attention_backend": "fa3", "decode_attention_backend": "flashinfer"},
    {**CUDA, "disable_cuda_graph": False},  # fa3 with SGLang's default graphs
    {**CUDA, "disable_cuda_graph": False, "attention_backend": "flashinfer"},
    {**CUDA, "disable_cuda_graph": False, "attention_backend": "triton"},
)


@pytest.mark.parametrize("args", PLAIN, ids=lambda args: "-".join(f"{k}={v}" for k, v in args.items()))
def test_plain_servers_violate_nothing(args: dict[str, Any], model_path: Callable[[str], Path]) -> None:
    assert violations(Case("", args), model_path("llama")) == []


def test_every_scorer_goes_where_it_can(model_path: Callable[[str], Path]) -> None:
    for scorer in (None, "auto", "torch"):
        assert violations(Case("", stated={"claa_scorer": scorer}), model_path("llama")) == []
    for scorer in (None, "auto", "torch", "triton", "flashinfer"):
        assert violations(Case("", CUDA, stated={"claa_scorer": scorer}), model_path("llama")) == []


def test_every_rule_has_a_case_and_every_case_a_rule() -> None:
    assert {case.rule for case in CASES} == {rule.id for rule in refusals.RULES}
    assert len({rule.id for rule in refusals.RULES}) == len(refusals.RULES)


def test_every_rule_says_why_and_what_to_do() -> None:
    for rule in refusals.RULES:
        text = str(rule)
        assert rule.reason and rule.remedy and f"[{rule.id}]" in text and f"Remedy: {rule.remedy}." in text


def test_all_violated_rules_are_reported_together(model_path: Callable[[str], Path]) -> None:
    found = violations(Case("", {"cpu_offload_gb": 1, "kv_canary": "log"}), model_path("llama"))
    assert found == ["weight-offload", "kv-canary"]


def test_a_bad_default_is_refused_with_its_flag_and_range(model_path: Callable[[str], Path]) -> None:
    record = resolved(model_path("llama"), {"preferred_sampling_params": BAD_DEFAULT})
    wrong = wrong_defaults(record.preferred_sampling_params)
    (rule,) = refusals.violated(resolved_view(record), model_config_of(record), WINDOW, {}, wrong)
    for words in (
        "--preferred-sampling-params",
        "custom_params.claa.keep_rate: got 7",
        "above 0 and at most 1",
        "Remedy",
    ):
        assert words in str(rule)


def test_a_missing_attribute_is_an_error_not_a_rule_that_passes(model_path: Callable[[str], Path]) -> None:
    record = resolved(model_path("llama"), {})
    facts = refusals.Facts(object(), model_config_of(record), WINDOW, {}, None, True, True, True, True)
    for rule in refusals.RULES:
        if "model" in rule.id or rule.remedy == refusals._MODEL or "server" in rule.id:
            continue
        if rule.id == "preferred-sampling-params":  # the caller has read that attribute
            continue
        with pytest.raises(AttributeError):
            rule.violated(facts)


def test_configs_are_real_files(model_path: Callable[[str], Path]) -> None:
    config = json.loads((model_path("llama") / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_hidden_layers"] == 4
