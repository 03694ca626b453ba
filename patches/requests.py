"""Every generation request gets its CLAA state where the scheduler builds it, and its place in the radix tree.

Pruned requests have a namespace of their own: the late rows of its nodes hold boundary states, which a dense
request would read as KV. No `extra_key` that a client can send leads from one namespace into the other.
`cache_salt` is a separate part of SGLang's key and is not touched.
"""

from __future__ import annotations

from typing import Any

import torch

from claa_sglang.forward.late_view import on_device
from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook
from claa_sglang.requests.dense_rules import ABORTED, INVALID, Facts, dense_reason
from claa_sglang.requests.options import RequestError, RequestOptions, check_decoding, check_explain, parse_options
from claa_sglang.requests.state import RequestState, given_positions
from claa_sglang.shadow.running import is_shadow
from claa_sglang.start.server_config import config_of, largest_window

MARK = "claa:"  # every key made here starts with it, and no key left alone does
DENSE = f"{MARK}dense|"


def pruned_state(req: Any) -> RequestState | None:
    """The state of a pruned request; None for any other, which takes the stock path."""
    state = attached.state.find(req)
    return state if state is not None and state.pruned else None


def pruned_key(extra_key: str | None, namespace: str) -> str:
    """Radix key of a pruned request: `namespace` (starts with MARK, has no "|"), then the client's key."""
    return f"{namespace}|{extra_key}" if extra_key else namespace


def dense_key(extra_key: str | None) -> str | None:
    """Radix key of a dense request: the client's own, as in stock, unless it could pass for one of ours."""
    return f"{DENSE}{extra_key}" if extra_key and extra_key.startswith(MARK) else extra_key


def client_key(key: str) -> str | None:
    """The client's key in what `pruned_key` made."""
    return key.partition("|")[2] or None


def sharers(own: str | None, salt: str | None) -> str:
    """One name for requests of the client's key `own` and this salt, who share what is cached; no other pair has it."""
    return repr((own, salt))


def attach_state(req: Any, scheduler: Any, recv_req: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER Scheduler._create_generation_req, also of sessions: sets the request's state and `req.extra_key`."""
    config = config_of(scheduler.server_args)
    prompt_tokens = _prompt_tokens(req, scheduler)
    try:
        options = parse_options(req.sampling_params.custom_params)
        check_decoding(options, config)
        if options.explain:
            check_explain(options, config, prompt_tokens, largest_window(scheduler.server_args))
    except RequestError as error:
        # The server process refuses these; whoever gets past it must still not stop the scheduler.
        attached.state.hang(req, RequestState.dense_request(RequestOptions(), prompt_tokens, INVALID))
        req.extra_key = dense_key(req.extra_key)
        req.set_finish_with_abort(str(error))
        return req
    reason = dense_reason(Facts(options, config, recv_req, prompt_tokens, scheduler.enable_session_radix_cache))
    if reason is None:
        make = RequestState.observed_request if config.observes else RequestState.pruned_request
        state = make(options, config, prompt_tokens)
        if options.keep is not None:
            keep = given_positions(options.keep, prompt_tokens, config.window)
            (positions,) = on_device([keep], torch.int64, scheduler.req_to_token_pool.req_to_token.device)
            state.progress.kept = [positions] * len(state.plan.steps)
            state.progress.late_computed_tokens = len(keep)
    else:
        state = RequestState.dense_request(options, prompt_tokens, reason)
    attached.state.hang(req, state)
    if is_shadow(recv_req.rid):  # what it leaves would have later requests run dense
        req.skip_radix_cache_insert = True
    req.extra_key = pruned_key(req.extra_key, config.namespace) if state.pruned else dense_key(req.extra_key)
    return req


def leave_on_abort(_result: None, req: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER Req.set_finish_with_abort, which SGLang calls on requests that are not scheduled yet.

    It replaces the prompt with one token and lets that run. So it runs dense and outside the pruned
    namespace: its plan was made for another length.
    """
    make_dense(req, ABORTED)


def make_dense(req: Any, reason: str) -> None:
    """Turn a pruned request that is not scheduled yet into a dense one; any other stays as it is."""
    state = attached.state.find(req)
    if state is not None and state.pruned:
        dense = RequestState.dense_request(state.plan.options, len(req.origin_input_ids), reason)
        attached.state.hang(req, dense)
        if reason == state.decision.why:  # so that its report says who chose
            dense.decision.why = reason
        if (asked := state.decision.dense_new_tokens) is not None:
            req.sampling_params.max_new_tokens, req.sampling_params.min_new_tokens = asked
        req.extra_key = dense_key(client_key(req.extra_key))


def _prompt_tokens(req: Any, scheduler: Any) -> int:
    """Length of the prompt as it will run: the scheduler may cut it, after this."""
    from sglang.srt.runtime_context import get_serving

    length = len(req.origin_input_ids or ())
    return min(length, scheduler.max_req_input_len) if get_serving().allow_auto_truncate else length


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._create_generation_req",
        params=("self", "recv_req", "args", "kwargs"),
        kind="after",
        fn=attach_state,
        process="scheduler",
        reason="a request is pruned or dense, and its radix namespace follows, from the moment it exists",
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.Req.set_finish_with_abort",
        params=("self", "error_msg", "status_code", "err_type"),
        kind="after",
        fn=leave_on_abort,
        process="scheduler",
        reason="an aborted request runs on a one-token prompt: dense, and not in the pruned namespace",
    ),
)
