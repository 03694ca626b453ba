"""What cannot be combined with `--enable-claa`, as a table: id, condition, reason, remedy.

Conditions read SGLang's resolved arguments and its ModelConfig by attribute, so that this module imports nothing
of SGLang; an attribute that does not exist is an error, never a rule that silently does not apply. What only the
loaded model can tell (how its layers are called) is checked in the scheduler, where the layers are wrapped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from claa_sglang.config import attention_backends
from claa_sglang.config.kv_type import KvType, kv_type

DEVICES = ("cpu", "cuda")
SPECIAL_ARCHITECTURES = (
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma3nForCausalLM",
    "Gemma3nForConditionalGeneration",
)


class Facts(NamedTuple):
    """What conditions read.

    args: SGLang's resolved server arguments. model: its ModelConfig. window: CLAA's observation window in tokens,
    0 when the configuration itself is refused. environ: environment variables. wrong_defaults: what is wrong with the
    options of CLAA in --preferred-sampling-params, None for nothing. decodes_over_kept: whether early layers do, by
    --claa-decode-dense-layers. observes: whether the server is one that observes, by --claa-mode. explains: whether
    requests may be explained, by --claa-allow-explain. shadows: whether it answers requests dense as well, by
    --claa-shadow-rate.
    """

    args: Any
    model: Any
    window: int
    environ: Mapping[str, str]
    wrong_defaults: str | None
    decodes_over_kept: bool
    observes: bool
    explains: bool
    shadows: bool


class Detail(str):
    """What a rule found in the arguments, for the reason."""


class Rule(NamedTuple):
    """One thing that cannot be combined with CLAA. `violated` answers for given facts; a Detail says what it found."""

    id: str
    violated: Callable[[Facts], Any]
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"[{self.id}] {self.reason}. Remedy: {self.remedy}."


def violated(
    args: Any,
    model: Any,
    window: int = 0,
    environ: Mapping[str, str] = os.environ,
    wrong_defaults: str | None = None,
    decodes_over_kept: bool = False,
    observes: bool = False,
    explains: bool = False,
    shadows: bool = False,
) -> list[Rule]:
    """All rules that hold against this start, in the order of the table; empty means CLAA may run. As in `Facts`."""
    facts = Facts(args, model, window, environ, wrong_defaults, decodes_over_kept, observes, explains, shadows)
    found = [(rule, rule.violated(facts)) for rule in RULES]
    return [
        rule._replace(reason=f"{rule.reason}: {answer}") if isinstance(answer, Detail) else rule
        for rule, answer in found
        if answer
    ]


def _flag(*names: str) -> Callable[[Facts], bool]:
    """Any of these arguments is set, on, or above zero."""
    return lambda f: any(getattr(f.args, name) for name in names)


def _above_one(*names: str) -> Callable[[Facts], bool]:
    return lambda f: any((getattr(f.args, name) or 0) > 1 for name in names)


def _attention_backends(f: Facts) -> tuple[str, str]:
    """Backends of prefill and decode; the specific argument wins over the general one."""
    general = f.args.attention_backend
    return (f.args.prefill_attention_backend or general, f.args.decode_attention_backend or general)


def _graph(f: Facts, phase: str) -> str:
    """How CUDA graphs are captured for a phase: full, breakable or disabled. None are ever captured on a CPU."""
    config = f.args.cuda_graph_config
    return "disabled" if config is None or f.args.device != "cuda" else getattr(config, phase).backend


def _text(f: Facts, name: str) -> Any:
    """A key of the model's text configuration, which may lack it; None then."""
    return getattr(f.model.hf_text_config, name, None)


def _kv_type(f: Facts) -> KvType:
    return kv_type(f.args.kv_cache_dtype, str(f.model.dtype), f.model.hf_quant_config)


def _not_run(f: Facts, run: tuple[str, ...]) -> bool:
    """Whether a backend of this server is one that late views were written for, and none of `run`."""
    return bool(set(_attention_backends(f)) & set(attention_backends.NAMES) - set(run))


def _wrong_defaults(f: Facts) -> Detail | None:
    return None if f.wrong_defaults is None else Detail(f"--preferred-sampling-params: {f.wrong_defaults}")


def _layer_kinds(f: Facts) -> set[str]:
    return set(_text(f, "layer_types") or ())


def _linear_layers(f: Facts) -> bool:
    kinds = {"linear_attention", "mamba", "mamba2", "conv", "recurrent"}
    named = any(_text(f, key) for key in ("linear_attn_config", "mamba_d_state", "ssm_state_size", "ssm_cfg"))
    hybrid = f.model.linear_attn_registry_result is not None or bool(kinds & _layer_kinds(f))
    return f.model.attention_arch.name == "SSM" or hybrid or named


def _layers_that_are_not_one_each(f: Facts) -> bool:
    return f.model.num_attention_layers != f.model.num_hidden_layers or bool(_text(f, "num_kv_shared_layers"))


_DROP = "start without {}"
_MODEL = "serve this model without --enable-claa"

RULES: tuple[Rule, ...] = (
    # --- how requests are scheduled and where they run
    Rule("speculative-decoding", _flag("speculative_algorithm"),
         "speculative decoding verifies several tokens at once and has a KV cache of its own, which has no late rows",
         _DROP.format("--speculative-algorithm")),
    Rule("disaggregation",
         lambda f: f.args.disaggregation_mode != "null" or f.args.decoupled_spec_role != "null"
         or f.args.encoder_only or f.args.language_only or f.args.enable_pdmux or f.args.enable_pd_role_switch,
         "prefill and decode in different places would have to send late slots along",
         _DROP.format("--disaggregation-mode, --encoder-only, --language-only and --enable-pdmux")),
    Rule("two-batch-overlap", _flag("enable_two_batch_overlap", "enable_single_batch_overlap"),
         "overlapped half batches split a batch behind the late view's back",
         _DROP.format("--enable-two-batch-overlap and --enable-single-batch-overlap")),
    Rule("dllm", _flag("dllm_algorithm"), "a diffusion model revisits tokens that a prune has dropped",
         _DROP.format("--dllm-algorithm")),
    Rule("multi-item-scoring", _flag("enable_mis"), "multi-item scoring reads logits of many prompt rows",
         _DROP.format("--enable-mis")),
    Rule("streaming-session", _flag("enable_streaming_session", "enable_session_radix_cache"),
         "a session's KV outlives its requests, late slots do not",
         _DROP.format("--enable-streaming-session and --enable-session-radix-cache")),
    Rule("chunk-below-window",
         lambda f: 0 < (f.args.chunked_prefill_size or 0) < f.window + (f.args.page_size or 1) - 1,
         "the last chunk of a prompt must hold the whole observation window, whose queries rank it, and the chunk "
         "before it ends with a page",
         "set --chunked-prefill-size to at least --claa-window and --page-size together, or to -1 for no chunks"),
    Rule("prefill-only", _flag("prefill_only_disable_kv_cache"), "without a KV cache there is nothing to prune",
         _DROP.format("--prefill-only-disable-kv-cache")),
    # Also set by --rl-on-policy-target. Chunks on flashinfer's tiles alone would not keep the promise.
    Rule("deterministic-inference", _flag("enable_deterministic_inference"),
         "deterministic inference promises one answer whatever else is cached and served, while the cache decides "
         "whether a prompt is pruned, and chunks and late prefills end where the window and the step's room allow, not "
         "on the backend's tiles",
         _DROP.format("--enable-deterministic-inference and --rl-on-policy-target")),
    # --- parallelism
    Rule("pipeline-parallel", _above_one("pp_size"), "the layers after the prune layer would be on another rank",
         "use --pp-size 1; --dp-size is free"),
    Rule("tensor-parallel-heads",
         lambda f: f.args.tp_size > 1 and f.model.get_total_num_kv_heads() % f.args.tp_size != 0,
         "several ranks would share a KV head, and each would see a part of the queries that score it",
         "use a --tp-size that divides the model's KV heads, with --dp-size for more GPUs"),
    Rule("sharded-rows",
         lambda f: f.args.enable_layernorm_sp or f.args.enable_attn_tp_input_scattered
         or f.args.tp_size > 1 and (f.args.moe_a2a_backend != "none" or f.args.moe_dense_tp_size is not None),
         "ranks would have different rows between layers, and a prune moves rows that each of them must have",
         _DROP.format("--enable-layernorm-sp, --enable-attn-tp-input-scattered, --moe-a2a-backend and "
                      "--moe-dense-tp-size")),
    Rule("attention-data-parallel", _above_one("attn_dp_size"),
         "ranks of data-parallel attention agree on row counts before the prune",
         "use --attn-dp-size 1 without --enable-dp-attention; --dp-size replicas are free"),
    Rule("context-parallel",
         lambda f: f.args.attn_cp_size > 1 or f.args.dcp_size > 1 or f.args.enable_prefill_cp
         or f.args.enable_dsa_cache_layer_split,
         "each rank would see only a part of the prompt to rank",
         "use --attn-cp-size 1 and --dcp-size 1 without --enable-prefill-cp"),
    Rule("multi-node", _above_one("nnodes"), "the configurations of different nodes are not compared with each other",
         "use one node, --nnodes 1"),
    Rule("ray", _flag("use_ray"), "schedulers in Ray actors do not report whether CLAA is active",
         _DROP.format("--use-ray")),
    # --- front ends
    Rule("rust-server",
         lambda f: f.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes", "y"),
         "the Rust server bypasses the tokenizer manager that checks and reports requests",
         "unset SGLANG_RUST_SERVER"),
    Rule("grpc-server",
         lambda f: f.args.smg_grpc_mode or f.args.grpc_mode or bool(f.environ.get("SMG_SGLANG_ZMQ_HANDSHAKE")),
         "the gRPC servers and smg's headless schedulers bypass the tokenizer manager that checks and reports requests",
         _DROP.format("--smg-grpc-mode, --grpc-mode and smg's launcher (SMG_SGLANG_ZMQ_HANDSHAKE)")),
    Rule("preferred-sampling-params", _wrong_defaults,
         "what it has for CLAA counts for every request, health checks too, so bad values would fail them all",
         'correct custom_params.claa in --preferred-sampling-params, or leave it out'),
    # --- memory
    Rule("hierarchical-cache",
         _flag("enable_hierarchical_cache", "hicache_storage_backend", "enable_lmcache", "enable_flexkv",
               "enable_unified_cache_external_linker"),
         "KV written to another tier would carry boundary states in place of late KV",
         _DROP.format("--enable-hierarchical-cache, --hicache-storage-backend, --enable-lmcache, --enable-flexkv "
                      "and --enable-unified-cache-external-linker")),
    Rule("radix-cache-backend", lambda f: f.args.radix_cache_backend is not None,
         "only SGLang's own unified radix cache is known to keep pruned requests in their namespace",
         _DROP.format("--radix-cache-backend")),
    Rule("kv-events", _flag("kv_events_config"),
         "a block event names its tokens and not its namespace, so pruned and dense blocks of one prompt would pass "
         "for each other, and a router would count on hits that cannot happen",
         _DROP.format("--kv-events-config")),
    Rule("hisparse", _flag("enable_hisparse"), "sparse KV swapping moves slots that late rows point to",
         _DROP.format("--enable-hisparse")),
    Rule("kv-sharding", _flag("enable_kv_cache_sharding"), "a late row must find all its slots on its own rank",
         _DROP.format("--enable-kv-cache-sharding")),
    Rule("unified-memory", _flag("enable_unified_memory", "enable_page_major_kv_layout"),
         "boundary states are stored in per-layer KV rows, which this layout does not have",
         _DROP.format("--enable-unified-memory and --enable-page-major-kv-layout")),
    Rule("page-size",
         lambda f: (f.args.page_size or 1) > 1 and _not_run(f, attention_backends.WITH_PAGES),
         "pages larger than a token were not run pruned with this attention backend",
         f"use --page-size 1, or --attention-backend {{{','.join(attention_backends.WITH_PAGES)}}}"),
    Rule("fp8-kv",
         lambda f: _kv_type(f) is KvType.FP8 and _not_run(f, attention_backends.WITH_FP8),
         "fp8 KV was not run pruned with this attention backend",
         f"use --kv-cache-dtype auto, or --attention-backend {{{','.join(attention_backends.WITH_FP8)}}}"),
    Rule("decode-over-kept",
         lambda f: f.decodes_over_kept
         and ((f.args.page_size or 1) > 1 or _not_run(f, attention_backends.WITH_KEPT)),
         "early layers that decode over kept tokens were not run with this attention backend, and kept tokens do not "
         "follow each other in pages larger than a token",
         "leave out --claa-decode-dense-layers, or use --page-size 1 and --attention-backend "
         f"{{{','.join(attention_backends.WITH_KEPT)}}}"),
    Rule("observe", lambda f: f.observes and (f.args.tp_size > 1 or _not_run(f, attention_backends.WITH_OBSERVE)),
         "observing was not run with this attention backend, and ranks of tensor parallelism, which have scores of "
         "their own KV heads, do not put them together where nothing is dropped",
         "leave out --claa-mode, or use --tp-size 1 and --attention-backend "
         f"{{{','.join(attention_backends.WITH_OBSERVE)}}}"),
    Rule("explain", lambda f: f.explains and f.args.tp_size > 1,
         "ranks of tensor parallelism have scores of their own KV heads, and put together the ranking alone",
         "leave out --claa-allow-explain, or use --tp-size 1"),
    Rule("shadow-workers", lambda f: f.shadows and f.args.tokenizer_worker_num > 1,
         "a tokenizer process does not see the clients of the others, so a shadow request of one would be in their way",
         "leave out --claa-shadow-rate, or use --tokenizer-worker-num 1"),
    Rule("kv-dtype", lambda f: _kv_type(f) is KvType.OTHER,
         "boundary states live in KV rows, and rows of this type are not known to hold them exactly",
         "use --kv-cache-dtype auto or fp8_e4m3, and a checkpoint whose KV is not quantized in another way"),
    Rule("memory-saver", _flag("enable_memory_saver"), "released and resumed KV memory forgets late slots",
         _DROP.format("--enable-memory-saver")),
    Rule("weight-offload",
         lambda f: f.args.cpu_offload_gb > 0 or f.args.offload_group_size > 0 or f.args.ple_offload_embedding,
         "offloaded layers are wrapped in the same place as CLAA wraps them",
         _DROP.format("--cpu-offload-gb, --offload-group-size and --ple-offload-embedding")),
    Rule("kv-canary", lambda f: f.args.kv_canary != "none",
         "the canary takes the boundary states in late-layer rows for corrupted KV", _DROP.format("--kv-canary")),
    # --- execution
    Rule("lora", _flag("enable_lora", "lora_paths"), "adapter batches are laid out for the rows before the prune",
         _DROP.format("--enable-lora and --lora-paths")),
    Rule("torch-compile", _flag("enable_torch_compile"), "compiled models run past the wrapped layers",
         _DROP.format("--enable-torch-compile")),
    Rule("fused-model-kernel", _flag("enable_nvidia_megakernel", "enable_amd_monokernel"),
         "whole-model kernels run past the wrapped layers",
         _DROP.format("--enable-nvidia-megakernel and --enable-amd-monokernel")),
    Rule("prefill-cuda-graph-full", lambda f: _graph(f, "prefill") == "full",
         "a full prefill graph has one number of rows for all layers", "--cuda-graph-backend-prefill=disabled"),
    Rule("decode-cuda-graph-breakable", lambda f: _graph(f, "decode") == "breakable",
         "late layers were only captured in full decode graphs", "--cuda-graph-backend-decode=full"),
    Rule("hidden-states",
         _flag("enable_return_hidden_states", "return_hidden_states_mode", "enable_return_aux_hidden_states"),
         "hidden states of dropped tokens do not exist after the prune layer",
         _DROP.format("--enable-return-hidden-states, --return-hidden-states-mode and "
                      "--enable-return-aux-hidden-states")),
    Rule("routed-experts",
         lambda f: f.args.enable_return_routed_experts or f.args.enable_return_indexer_topk
         or f.args.expert_distribution_recorder_mode == "per_token",
         "per-layer records of dropped tokens do not exist after the prune layer",
         _DROP.format("--enable-return-routed-experts and --enable-return-indexer-topk")
         + ", and with --expert-distribution-recorder-mode stat"),
    Rule("attention-backend", lambda f: not set(_attention_backends(f)) <= set(attention_backends.NAMES),
         "the attention backend is not one that late views were written for",
         f"use --attention-backend {{{','.join(attention_backends.NAMES)}}}"),
    Rule("device", lambda f: str(f.args.device).split(":")[0] not in DEVICES,
         "only CUDA devices and SGLang's CPU engine are supported", "use --device cuda or --device cpu"),
    Rule("scorer-on-cpu",
         lambda f: str(f.args.device) == "cpu" and f.args.claa_scorer not in (None, "auto", "torch"),
         "the CPU engine scores in torch: the kernels of Triton and FlashInfer need a GPU",
         "use --claa-scorer auto or torch, or leave it out"),
    # --- the model
    Rule("embedding-model", lambda f: f.args.is_embedding or not f.model.is_generation,
         "an embedding or reward model reads rows that a prune drops", _MODEL),
    Rule("multimodal", lambda f: f.model.is_multimodal or f.model.is_audio_model,
         "image and audio tokens are not tested, and multimodal models wrap their layers differently", _MODEL),
    Rule("encoder-decoder", lambda f: f.model.is_encoder_decoder, "cross-attention has no late view", _MODEL),
    Rule("mla", lambda f: f.model.attention_arch.name == "MLA",
         "multi-head latent attention has no per-head keys to score, and its KV rows hold no boundary states", _MODEL),
    Rule("sliding-window",
         lambda f: f.model.is_hybrid_swa or f.model.is_local_attention_model
         or f.model.attention_chunk_size is not None
         or bool({"sliding_attention", "chunked_attention"} & _layer_kinds(f)),
         "sliding-window or chunked attention counts positions that pruned rows do not have", _MODEL),
    Rule("linear-attention", _linear_layers, "state-space and linear-attention layers need every token in turn",
         _MODEL),
    Rule("attention-sinks", lambda f: f.model.has_attention_sinks, "learned attention sinks are not in the scores",
         _MODEL),
    Rule("shared-kv", _layers_that_are_not_one_each,
         "layers that share KV, or run more than once, cannot be split into early and late ones", _MODEL),
    Rule("different-key-value-size", lambda f: f.model.attention_arch.name == "MHA" and f.model.has_asymmetric_kv,
         "keys and values of different sizes leave no place for boundary states", _MODEL),
    Rule("model-family", lambda f: bool(set(SPECIAL_ARCHITECTURES) & set(f.model.hf_config.architectures or ())),
         "this model family calls its layers in its own way", _MODEL),
)  # fmt: skip
