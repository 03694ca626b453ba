"""`--claa-shadow-rate`: a share of the pruned requests is answered dense as well while no client waits.

It all happens in the server process, which has the tokens of prompts and answers. The dense answer is not decoded: one
request that opts out of pruning asks for the log probabilities of the pruned answer's tokens, and of the most likely
ones in their places. To SGLang that is a request like a client's, which leaves nothing in the prefix cache.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Awaitable, Callable
from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput, unwrap_from_pickle
from sglang.srt.runtime_context import get_exec, get_serving

from claa_sglang.metrics.shadow import ShadowMetrics
from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.metrics import labels_of
from claa_sglang.requests.report import KEY
from claa_sglang.shadow.agreement import Agreement, agreement
from claa_sglang.shadow.counts import Counts
from claa_sglang.shadow.drawing import Draws, Facts, can_be_drawn
from claa_sglang.shadow.running import Shadows
from claa_sglang.shadow.waiting import ANSWER_TOKENS, Shadow
from claa_sglang.start.server_config import config_of

logger = logging.getLogger(__name__)
ENDED = ("stop", "length")  # finish reasons of an answer that is whole


class Asking:
    """A server, as `claa_sglang.shadow.running.Server` has it. manager: SGLang's TokenizerManager."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def is_idle(self) -> bool:
        """A check of health is no client."""
        manager = self._manager
        others = (rid for rid in manager.rid_to_state if not str(rid).startswith(HEALTH_CHECK_RID_PREFIX))
        return not manager.is_pause and next(others, None) is None

    def is_leaving(self) -> bool:
        return bool(self._manager.gracefully_exit)

    async def answer(self, shadow: Shadow, rid: str) -> Agreement | None:
        """One dense prefill over prompt and answer."""
        first = len(shadow.prompt) - 1  # the row of the prompt's last token says what is likely after it
        extra_key, cache_salt = shadow.keys
        asked = GenerateReqInput(
            rid=rid,
            input_ids=[*shadow.prompt, *shadow.answer],
            sampling_params={"temperature": 0, "max_new_tokens": 0, "custom_params": {KEY: {"enabled": False}}},
            return_logprob=True,
            logprob_start_len=first,
            top_logprobs_num=1,
            log_metrics=False,
            no_logs=True,
            extra_key=extra_key,
            cache_salt=cache_salt,
        )
        meta: dict[str, Any] = {}
        async for output in self._manager.generate_request(asked, None):
            meta = output["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            return None
        # The first item is that token's own, of which nothing is known.
        return agreement(shadow.answer, meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:])

    def abort(self, rid: str) -> bool:
        """As `TokenizerManager.abort_request`, which would count an aborted request of a client's."""
        state = self._manager.rid_to_state.get(rid)
        if state is None or not state.dispatched:
            return False
        state.abort_sent = True
        self._manager._dispatch_to_scheduler(AbortReq(rid=rid, abort_all=False))
        return True


class OwnShadows:
    """Everything of shadow requests in one server process. manager: SGLang's TokenizerManager."""

    def __init__(self, manager: Any, rate: float) -> None:
        self._manager = manager
        self.draws = Draws(rate, getattr(manager.server_args, "random_seed", None) or 0)
        self.counts = Counts()
        self.shadows = Shadows(Asking(manager), self._settle)
        self._metrics: ShadowMetrics | None = None

    def _settle(self, shadow: Shadow, result: str, found: Agreement | None) -> None:
        kind = "sampled" if shadow.sampled else "greedy"
        self.counts.count(kind, result, found)
        if not self._manager.enable_metrics:
            return
        try:
            if self._metrics is None:
                self._metrics = ShadowMetrics(self._manager.metrics_collector)
            self._metrics.count(shadow.labels, kind, result, found)
        except Exception:  # a number is not worth what comes after it
            logger.exception("CLAA could not count a shadow request in /metrics")

    def stats(self) -> dict[str, Any]:
        """How many wait, and what became of the others."""
        return {"waiting": len(self.shadows.waiting), **self.counts.stats()}

    def room(self, prompt_tokens: int) -> int:
        """Tokens of an answer that can be asked about after so long a prompt, as SGLang checks lengths."""
        manager = self._manager
        longest = manager.context_len - 1 - manager.num_reserved_tokens
        if manager.max_req_input_len is not None:
            longest = min(longest, manager.max_req_input_len - 1)
        return min(ANSWER_TOKENS, longest - prompt_tokens)


def _own(manager: Any) -> OwnShadows | None:
    """Of this TokenizerManager, made here if its server has a rate; else None."""
    own = attached.shadows.find(manager)
    if own is None and (rate := config_of(manager.server_args).shadow_rate):
        own = attached.shadows.hang(manager, OwnShadows(manager, rate))
    return own


def draw(result: Any, self: Any, obj: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER `TokenizerManager._create_tokenized_object`: whether this request is drawn. Its prompt is known here only.

    Drawing before it ran is drawing with the same share from those that will be pruned, and keeps no other prompt.
    """
    own = _own(self)
    if own is None or not isinstance(obj, GenerateReqInput) or own.shadows.asks(obj.rid):
        return result
    try:
        features = get_exec().features
        steers = bool(features.enable_watermark or get_serving().enable_strict_thinking)
        if can_be_drawn(Facts(result, obj.no_logs, steers)) and own.draws.draw():
            params = result.sampling_params
            shadow = Shadow(
                prompt=result.input_ids,
                sampled=params.top_k != 1,  # what SGLang makes of temperature 0
                labels=labels_of(self, obj) if self.enable_metrics else {},
                keys=(result.extra_key, result.cache_salt),
                weights=own.shadows.weights,
            )
            attached.drawn.hang(self.rid_to_state[obj.rid], shadow)
    except Exception:  # a comparison is not worth an answer
        logger.exception("CLAA could not draw request %s", obj.rid)
    return result


async def offer_answered(original: Callable[..., Awaitable[None]], self: Any, recv_obj: Any) -> None:
    """AROUND `TokenizerManager._handle_batch_output`: requests that were drawn and pruned are offered when they end."""
    own = attached.shadows.find(self)
    if own is None:
        await original(self, recv_obj)
        return
    try:
        ended = _ended(self, recv_obj)
    except Exception:  # a comparison is not worth the answers of this step
        logger.exception("CLAA could not tell which requests ended")
        ended = []
    await original(self, recv_obj)
    for state, shadow in ended:
        room = min(own.room(len(shadow.prompt)), len(state.output_ids))
        if room > 0:
            shadow.answer = array("q", state.output_ids[:room])
            own.shadows.offer(shadow)


def _ended(manager: Any, recv_obj: Any) -> list[tuple[Any, Shadow]]:
    """The states of requests that were drawn, were pruned, and end with this output."""
    found, reports = [], None
    for index, (rid, end) in enumerate(zip(recv_obj.rids, recv_obj.finished_reasons, strict=True)):
        state = manager.rid_to_state.get(rid) if end is not None and end["type"] in ENDED else None
        shadow = None if state is None else attached.drawn.find(state)
        if shadow is None:
            continue
        if reports is None:
            reports = (unwrap_from_pickle(recv_obj.customized_info) or {}).get(KEY) or [()] * len(recv_obj.rids)
        # A prompt that the scheduler cut is not the one that was drawn.
        if reports[index] and reports[index][0].get("pruned") and recv_obj.prompt_tokens[index] == len(shadow.prompt):
            found.append((state, shadow))
    return found


def make_way(self: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE `TokenizerManager._init_req_state`, where every request is first known: a client's ends ours."""
    own = attached.shadows.find(self)
    if own is None or (isinstance(obj.rid, str) and obj.rid.startswith(HEALTH_CHECK_RID_PREFIX)):
        return
    if not own.shadows.asks(obj.rid):
        own.shadows.client_arrives()


async def without_shadows(original: Callable[..., Awaitable[Any]], self: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND what needs a server without requests, or pauses it: none of ours is there meanwhile."""
    own = attached.shadows.find(self)
    if own is None:
        return await original(self, *args, **kwargs)
    async with own.shadows.held():
        return await original(self, *args, **kwargs)


async def with_other_weights(original: Callable[..., Awaitable[Any]], self: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND a weight update: likewise, and no answer of the weights so far is compared any more."""
    own = attached.shadows.find(self)
    if own is None:
        return await original(self, *args, **kwargs)
    async with own.shadows.held():
        try:
            return await original(self, *args, **kwargs)
        finally:
            own.shadows.forget()  # also what was answered while the update waited for clients


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_CONTROL = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
_UPDATES = (
    f"{_MANAGER}.update_weights_from_disk",
    f"{_CONTROL}.update_weights_from_distributed",
    f"{_CONTROL}.update_weights_from_tensor",
    f"{_CONTROL}.update_weights_from_ipc",
    f"{_CONTROL}.begin_weight_update",
    f"{_CONTROL}.end_weight_update",
)

HOOKS: tuple[Hook, ...] = (
    Hook(
        target=f"{_MANAGER}._create_tokenized_object",
        params=("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids"),
        kind="after",
        fn=draw,
        process="server",
        reason="with --claa-shadow-rate, prompts of drawn requests are kept: only here are their tokens known",
    ),
    Hook(
        target=f"{_MANAGER}._handle_batch_output",
        params=("self", "recv_obj"),
        kind="around",
        fn=offer_answered,
        process="server",
        reason="the answer of a drawn request is complete here, and its report says whether it was pruned",
    ),
    Hook(
        target=f"{_MANAGER}._init_req_state",
        params=("self", "obj", "request"),
        kind="before",
        fn=make_way,
        process="server",
        reason="a client's request that arrives ends the shadow request that runs",
    ),
    Hook(
        target=f"{_MANAGER}.pause_generation",
        params=("self", "obj"),
        kind="around",
        fn=without_shadows,
        process="server",
        reason="no shadow request is paused, or waited for",
    ),
    Hook(
        target=f"{_CONTROL}.flush_cache",
        params=("self", "timeout_s"),
        kind="around",
        fn=without_shadows,
        process="server",
        reason="SGLang empties its cache only while no request runs",
    ),
    *(
        Hook(
            target=target,
            params=("self", "obj", "request"),
            kind="around",
            fn=with_other_weights,
            process="server",
            reason="an update does not wait for shadow requests, and answers of other weights are not compared",
        )
        for target in _UPDATES
    ),
)
