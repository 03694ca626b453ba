"""A failure in one request's own computation ends that request with an error; the server and its batch go on."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook


def keep_out(self: Any, req: Any) -> None:
    """BEFORE `Scheduler.stash_chunked_request`: a chunk that failed is not put into the prefix cache. With overlap, the
    next step is made before its result is processed."""
    state = attached.state.find(req)
    if state is not None and state.progress.error is not None:
        req.skip_radix_cache_insert = True


def end_failed(self: Any, batch: Any, result: Any) -> None:
    """BEFORE `Scheduler.process_batch_result`: failed requests finish with their error, as stock's own aborts do.

    With overlap, one may have been retracted since it failed: it waits to be computed again, and would be.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    for req in batch.reqs:
        state = attached.state.find(req)
        if state is None or state.progress.error is None or req.finished():
            continue
        req.skip_radix_cache_insert = True  # tokens of this step may have no boundary state
        reason = FINISH_ABORT(state.progress.error, HTTPStatus.INTERNAL_SERVER_ERROR)
        if req.is_retracted:
            _end_waiting(self, req, reason)
        elif batch.forward_mode.is_extend():
            req.discard_output_reason = reason  # nothing of this forward is committed or published
            if req is self.chunked_req:
                self._pending_chunked_abort_req = req  # its next chunk never runs
        else:
            req.to_finish = reason


def _end_waiting(scheduler: Any, req: Any, reason: Any) -> None:
    """End a request that waits and holds nothing, as `Scheduler.abort_request` does; that one takes every request whose
    id begins like this one's. Nothing to do where stock has ended it, for want of memory or of a place to wait."""
    from sglang.srt.managers.scheduler import _make_abort_req

    if req not in scheduler.waiting_queue:
        return
    scheduler.waiting_queue.remove(req)
    scheduler._release_aborted_request(req)
    scheduler.send_abort_output(_make_abort_req(req, finished_reason=reason.to_json()), req)
    req.finished_reason = reason  # no pending abort of it looks for it


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.stash_chunked_request",
        ("self", "req"),
        "before",
        keep_out,
        "scheduler",
        "What a failed chunk left in its slots must not be found by others.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        ("self", "batch", "result"),
        "before",
        end_failed,
        "scheduler",
        "A request whose ranking or late pass failed must end with an error, and take nobody with it.",
    ),
)
