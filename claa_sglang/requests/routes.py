"""Every HTTP route of SGLang, and what it does with the options of CLAA. A test compares it with SGLang's own list.

A route that SGLang adds belongs into one of the groups here before it is served.
"""

from __future__ import annotations

from typing import NamedTuple

from claa_sglang.requests import body


class Route(NamedTuple):
    """A route whose prompts may be pruned.

    path: SGLang's default for it; operators can rename some. place: where its body has `custom_params`. report: where
    the report of a whole answer is. streamed: where that of a stream is.
    """

    path: str
    place: str
    report: str
    streamed: str


_META, _METADATA = '`meta_info["claa"]`', '`metadata["claa"]`'
_LIST = f"{_METADATA}, a list where there are several choices"
_ENDS = f"{_METADATA} of the chunk with the choice's `finish_reason`"
_DONE = f"{_METADATA} of the line with `done`"

PRUNES: tuple[Route, ...] = (
    Route("/generate", body.SAMPLING, _META, f"{_META} of the last event"),
    Route("/vertex_generate", body.PARAMETERS, f"{_META} of each prediction", f"{_META} of the last event"),
    Route("/v1/completions", body.TOP, _LIST, _ENDS),
    Route("/v1/chat/completions", body.TOP, _LIST, _ENDS),
    Route("/invocations", body.TOP, _LIST, _ENDS),
    Route("/v1/responses", body.TOP, f"{_METADATA}, stored ones too", f"{_METADATA} of the last event's response"),
    Route("/v1/messages", body.TOP, _METADATA, f"{_METADATA} of the `message_delta` event"),
    Route("/api/chat", body.OPTIONS, _METADATA, _DONE),
    Route("/api/generate", body.OPTIONS, _METADATA, _DONE),
)

# Their prompts always run dense, and a body with options is refused.
DENSE: tuple[str, ...] = ("/v1/score", "/v1/decisions", "/v1/rerank")

# Served for models that `--enable-claa` is refused with; SGLang answers HTTP 400 for any other.
OTHER_MODELS: tuple[str, ...] = (
    "/encode",
    "/classify",
    "/v1/embeddings",
    "/v1/classify",
    "/v1/systemone",
    "/v1/audio/transcriptions",
    "/v1/realtime",
)

# One token, which is always dense.
HEALTH: tuple[str, ...] = ("/health", "/health_generate")

# No prompt of theirs reaches the scheduler.
NO_PROMPT: tuple[str, ...] = tuple(
    """
    / /abort_request /add_external_corpus /api/show /api/tags /begin_weight_update /close_session /configure_logging
    /continue_generation /destroy_weights_update_group /detokenize /docs /docs/oauth2-redirect
    /dump_expert_distribution_record /end_weight_update /flush_cache /freeze_gc /get_hicache_l3_cache_layout
    /get_model_info /get_remote_instance_transfer_engine_info /get_server_info /get_weights_by_name
    /hicache/storage-backend /hicache/storage-backend/clear /init_weights_send_group_for_remote_instance
    /init_weights_update_group /list_external_corpora /load_lora_adapter /load_lora_adapter_from_tensors /model_info
    /open_session /openapi.json /parse_function_call /pause_generation /pd_role_switch /ping /ready /redoc
    /release_memory_occupation /remote_instance_transfer_engine_info /remove_external_corpus
    /resume_memory_occupation /send_weights_to_remote_instance /separate_reasoning /server_info /set_internal_state
    /set_trace_level /slow_down /start_expert_distribution_record /start_profile /stop_expert_distribution_record
    /stop_profile /tokenize /unload_lora_adapter /update_weight_version /update_weights_from_disk
    /update_weights_from_distributed /update_weights_from_ipc /update_weights_from_tensor /v1/detokenize /v1/loads
    /scale_elastic_ep /is_scaling_elastic_ep
    /v1/messages/count_tokens /v1/models /v1/models/{model:path} /v1/responses/{response_id}
    /v1/responses/{response_id}/cancel /v1/tokenize /weights_checker
    """.split()
)
