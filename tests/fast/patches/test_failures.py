"""Requests that failed end, wherever they are when their result is processed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import scheduler as sglang_scheduler
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from claa_sglang.patches import attached
from claa_sglang.patches.failures import end_failed
from tests.fast.patches.world import PROMPT, World


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sglang_scheduler, "get_serving", lambda: SimpleNamespace(weight_version="default"))
    sent: list[Any] = []
    made = SimpleNamespace(
        waiting_queue=[],
        tree_cache=World().tree,
        sent=sent,
        chunked_req=None,
        _pending_chunked_abort_req=None,
        send_abort_output=lambda output, req: sent.append(output),
    )
    made._release_aborted_request = lambda req: sglang_scheduler.Scheduler._release_aborted_request(made, req)
    return made


def request(rid: str) -> Req:
    req = World().request(PROMPT)
    req.rid = rid
    return req


def failed(rid: str, retracted: bool) -> Req:
    req = request(rid)
    attached.state.of(req).progress.fail("ranking its prompt", RuntimeError("planted"))
    if retracted:
        req.reset_for_retract()
    return req


def of(*reqs: Req, is_extend: bool) -> Any:
    return SimpleNamespace(reqs=list(reqs), forward_mode=SimpleNamespace(is_extend=lambda: is_extend))


@pytest.mark.parametrize("is_extend", [True, False])
def test_one_that_was_retracted_meanwhile_does_not_run_again(is_extend: bool, scheduler: Any) -> None:
    req, others = failed("a", retracted=True), [request("ab"), request("b")]
    scheduler.waiting_queue += [others[0], req, others[1]]
    end_failed(scheduler, of(*others, req, is_extend=is_extend), None)
    assert scheduler.waiting_queue == others  # also the one whose id begins like its
    (output,) = scheduler.sent
    assert output.rid == "a" and output.finished_reason["status_code"] == 500
    assert "CLAA failed while ranking its prompt: RuntimeError: planted" in output.finished_reason["message"]
    assert req.finished() and not any(other.finished() for other in others)
    end_failed(scheduler, of(req, is_extend=False), None)  # the step that was made before
    assert len(scheduler.sent) == 1


def test_one_that_stock_has_ended_is_left_alone(scheduler: Any) -> None:
    req = failed("a", retracted=True)
    end_failed(scheduler, of(req, is_extend=False), None)
    assert scheduler.sent == []


def test_one_that_runs_ends_with_its_result(scheduler: Any) -> None:
    prefill, decode = failed("a", retracted=False), failed("b", retracted=False)
    scheduler.chunked_req = prefill
    end_failed(scheduler, of(prefill, is_extend=True), None)
    end_failed(scheduler, of(decode, is_extend=False), None)
    assert isinstance(prefill.discard_output_reason, FINISH_ABORT) and scheduler._pending_chunked_abort_req is prefill
    assert isinstance(decode.to_finish, FINISH_ABORT)
    assert prefill.skip_radix_cache_insert and decode.skip_radix_cache_insert and scheduler.sent == []
