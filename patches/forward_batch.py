"""Attach the batch plan to SGLang's ForwardBatch, where the requests are still at hand.

The plan reaches a forward in two ways, and neither can do the other's work:

- On the batch (`model_specific_states`), which every eager forward is given: attention's planning, the choice of a
  prefill graph, and the step timer read it there, whichever batch was made last.
- By `ClaaAttnBackend.note`, for decode graphs alone: before a replay SGLang hands the backend a stand-in for the batch,
  made of the graph's buffers (`build_replay_fb_view`), which leaves `model_specific_states` out. A replay follows the
  making of its batch directly, so what was noted last is its plan.

`ClaaAttnBackend.active` is no third one: it is the forward's state (scores, views), made from the plan. Layers ask for
it, as SGLang passes nothing else of ours through a model.
"""

from __future__ import annotations

from typing import Any

from claa_sglang.forward.batch_plan import BatchPlan, Segment, plan_decode, plan_extend, plan_observed
from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.memory import late_slots_of
from claa_sglang.requests.state import RequestState

_KEY, _OBSERVED = "claa", "claa_observed"


def plan_of(forward_batch: Any) -> BatchPlan | None:
    """The plan of a batch that has pruned requests, else None."""
    return (forward_batch.model_specific_states or {}).get(_KEY)


def observed_of(forward_batch: Any) -> tuple[Segment, ...] | None:
    """The requests of a batch that are ranked in it and drop nothing; None where there are none."""
    return (forward_batch.model_specific_states or {}).get(_OBSERVED)


def batch_and_runner(args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """The schedule batch and the model runner in a call of `ForwardBatch.init_new`.

    A classmethod's hook sees the class first; a caller may pass everything by name.
    """
    bound = dict(zip(INIT_NEW, args, strict=False)) | kwargs
    return bound["batch"], bound["model_runner"]


def attach_plan(result: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER `ForwardBatch.init_new`: a batch with pruned requests carries its plan, any other stays as it was."""
    batch, runner = batch_and_runner(args, kwargs)
    plan = _made_plan(result, batch, runner)
    if plan is not None:
        result.model_specific_states = {**(result.model_specific_states or {}), _KEY: plan}
    elif observed := _observed(result, batch, runner):
        result.model_specific_states = {**(result.model_specific_states or {}), _OBSERVED: observed}
    runner.attn_backend.note(plan)
    return result


def _made_plan(result: Any, batch: Any, runner: Any) -> BatchPlan | None:
    """The plan of a schedule batch, whose ForwardBatch is `result`; None for one without pruned requests."""
    states = [attached.state.find(req) for req in batch.reqs]
    if not any(state is not None and state.pruned for state in states):
        return None
    slots = late_slots_of(runner.req_to_token_pool)
    rows = [req.kv.req_pool_idx for req in batch.reqs]
    if result.forward_mode.is_decode():
        return plan_decode(
            states,
            rows=rows,
            seq_lens=batch.seq_lens_cpu.tolist(),
            table_stride=slots.stride,
            num_steps=slots.num_steps,
            stale=[_is_stale(req, state) for req, state in zip(batch.reqs, states, strict=True)],
        )
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    return plan_extend(
        states,
        rows=rows,
        prefix_lens=batch.prefix_lens,
        extend_lens=batch.extend_lens,
        last_chunk=[req.extend_end == len(req.full_untruncated_fill_ids) for req in batch.reqs],
        table_stride=slots.stride,
        num_steps=slots.num_steps,
        decoding=[id(req) in decoding for req in batch.reqs],
    )


def _observed(result: Any, batch: Any, runner: Any) -> tuple[Segment, ...]:
    """Of a prefill batch, the observed requests whose prompt is complete and whose whole window is computed in it."""
    states = [attached.state.find(req) for req in batch.reqs]
    if result.forward_mode.is_decode() or not any(state is not None and state.observed for state in states):
        return ()
    return plan_observed(
        states,
        rows=[req.kv.req_pool_idx for req in batch.reqs],
        prefix_lens=batch.prefix_lens,
        extend_lens=batch.extend_lens,
        window=runner.attn_backend.config.window,
    )


def _is_stale(req: Any, state: RequestState | None) -> bool:
    """Whether the request's row of kept tokens, if it has one, must be listed from the start, as it will be now."""
    if state is None or state.plan.decode_dense_layers is None:
        return False
    before, state.progress.listed = state.progress.listed, (req.kv.req_pool_idx, req.kv.cache_protected_len)
    return before != state.progress.listed


INIT_NEW = (
    "cls",
    "batch",
    "model_runner",
    "capture_hidden_mode",
    "return_hidden_states_before_norm",
    "extend_position_info",
    "spec_mrope_positions",
    "kv_loc_plan",
    "write_cols",
)
HOOKS = (
    Hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        INIT_NEW,
        "after",
        attach_plan,
        "scheduler",
        "The last place that sees both the requests and the batch the model runs.",
    ),
)
