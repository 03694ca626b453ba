"""Tensor parallelism: what a forward asks of the ranks, on SGLang's groups, and what steers them, on its broadcast.

Every rank runs the scheduler by itself, from the requests that the first one sends around in each iteration. What is
measured must not differ between them: the cost model's constants, by which ways are chosen and steps of finishing are
cut, and whether it is time for such a step. The first rank measures, and sends what it found along with the requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_parallel
from torch import Tensor
from torch.distributed import ReduceOp

from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.policy import live_policy
from claa_sglang.policy.decided import Decided


class GroupRanks:
    """`Ranks` on one of SGLang's groups.

    On GPUs its NCCL communicator is used on the stream of the forward, as SGLang's own reductions are in CUDA graphs:
    a communicator of torch's would take memory of its own. group: SGLang's GroupCoordinator, of two or more ranks.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.size = group.world_size
        self.checked = envs.SGLANG_CHECK_KV_PAGE_INVARIANTS.get()

    def largest(self, values: Tensor) -> None:
        if (nccl := self._nccl(values)) is None:
            torch.distributed.all_reduce(values, op=ReduceOp.MAX, group=self._group.device_group)
            return
        with nccl.change_state(enable=True):
            nccl.all_reduce(values, op=ReduceOp.MAX)

    def gather(self, values: Tensor) -> list[Tensor]:
        found = values.new_empty(self.size, values.numel())
        if (nccl := self._nccl(values)) is None:
            torch.distributed.all_gather(list(found), values.view(-1), group=self._group.device_group)
        else:
            with nccl.change_state(enable=True):
                nccl.all_gather(found, values)
        return [part.view(values.shape) for part in found]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        found = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(found, op=ReduceOp.MAX, group=self._group.cpu_group)
        return [bool(flag) for flag in found.tolist()]

    def are_same(self, values: Sequence[Tensor]) -> bool:
        digest = blake2b(digest_size=16)
        for value in values:
            digest.update(value.cpu().numpy().tobytes() + b"|")
        mine = torch.tensor(list(digest.digest()), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(found, mine, group=self._group.cpu_group)
        return all(torch.equal(mine, other) for other in found)

    def _nccl(self, values: Tensor) -> Any:
        nccl = getattr(self._group, "pynccl_comm", None)
        return nccl if values.is_cuda and nccl is not None and nccl.available else None


def model_ranks() -> GroupRanks | None:
    """The ranks of the model that this process has a part of; None if it has all of it."""
    return None if is_alone() else GroupRanks(get_parallel().attn_tp_group)


def is_alone() -> bool:
    """Whether this process has the whole model."""
    return get_parallel().attn_tp_group.world_size == 1


def decide(result: list, self: Any) -> list:
    """AFTER `Scheduler._poll_timeout_aborts`, which the first rank calls for what all are to hear: what it measured."""
    if is_alone():
        return result
    live, finishing = live_policy(self.req_to_token_pool), attached.finishing.find(self.req_to_token_pool)
    constants = None if live is None else live.news()
    # Sent until it was heard: where requests are not taken from the queue, neither is this.
    idle = finishing is not None and self.is_fully_idle() and finishing.is_due(self.forward_ct)
    decided = Decided(constants, self.forward_ct if idle else None)
    return result if decided == Decided() else [*result, decided]


def hear(self: Any, recv_reqs: list) -> None:
    """BEFORE `Scheduler.process_input_requests`: every rank does what the first one decided, in the same iteration."""
    heard = [one for one in recv_reqs if isinstance(one, Decided)]
    if not heard:
        return
    recv_reqs[:] = [one for one in recv_reqs if not isinstance(one, Decided)]
    live, finishing = live_policy(self.req_to_token_pool), attached.finishing.find(self.req_to_token_pool)
    for decided in heard:
        if decided.constants is not None and live is not None:
            live.adopt(decided.constants)
        if decided.finish_after is not None and finishing is not None:
            finishing.granted = decided.finish_after


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._poll_timeout_aborts",
        ("self",),
        "after",
        decide,
        "scheduler",
        "What one tensor-parallel rank measured must reach all of them, with the requests.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.process_input_requests",
        ("self", "recv_reqs"),
        "before",
        hear,
        "scheduler",
        "What the first rank sent along with the requests is no request.",
    ),
)
