"""What ranks of tensor parallelism exchange, between two processes; and what the first of them tells the others."""

from __future__ import annotations

import multiprocessing
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_parallel

from claa_sglang.finishing.finishing import QUIET, Finishing
from claa_sglang.finishing.queue import Prefix
from claa_sglang.patches import attached, ranks
from claa_sglang.patches.policy import LivePolicy, of_first_rank
from claa_sglang.policy.cost import Constants, CostModel, GivenCosts
from claa_sglang.policy.decided import Decided

RANKS = 2
OLD, NEW = Constants(1.0, 2.0, 3.0, 4.0, 5.0), Constants(1.5, 2.0, 3.0, 4.0, 5.0)


def exchange(rank: int, meet: str, found: Any) -> None:
    """One rank's process: everything once."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=RANKS)
    group = torch.distributed.group.WORLD
    own = ranks.GroupRanks(
        SimpleNamespace(world_size=RANKS, cpu_group=group, device_group=group, ranks=[0, 1], pynccl_comm=None)
    )
    values = torch.tensor([[1.0, float(rank)], [-float(rank), -torch.inf]])
    own.largest(values)
    found[rank] = {
        "largest": values.tolist(),
        "gather": [part.tolist() for part in own.gather(torch.tensor([float(rank)] * 3))],
        "any_of": own.any_of([rank == 1, False, True]),
        "same": own.are_same([torch.arange(3), torch.tensor([5])]),
        "different": own.are_same([torch.arange(3), torch.tensor([5 + rank])]),
        "cut elsewhere": own.are_same([torch.arange(2 + rank), torch.arange(2 + rank, 4)]),
        "constants": tuple(of_first_rank(Constants(*(rank + x for x in OLD)), own._group)),
    }
    torch.distributed.destroy_process_group()


def test_two_processes_exchange_what_a_forward_asks(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        found = manager.dict()
        processes = [context.Process(target=exchange, args=(r, str(tmp_path / "meet"), found)) for r in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
        first, second = found[0], found[1]
    assert first == second
    assert first == {
        "largest": [[1.0, 1.0], [0.0, -torch.inf]],
        "gather": [[0.0] * 3, [1.0] * 3],
        "any_of": [True, False, True],
        "same": True,
        "different": False,
        "cut elsewhere": False,
        "constants": tuple(OLD),
    }


class OneRanksScheduler:
    """What the hooks ask of the scheduler of one rank, with the broadcast between them left to the test."""

    def __init__(self) -> None:
        self.now = 0.0
        self.req_to_token_pool = SimpleNamespace()
        self.finishing = attached.finishing.hang(self.req_to_token_pool, Finishing(clock=lambda: self.now))
        self.live = LivePolicy.__new__(LivePolicy)  # one that measures costs a model
        self.live.learned = CostModel(OLD)
        self.live.timer = SimpleNamespace(collect=lambda: None)  # type: ignore[assignment]
        self.live.policy = SimpleNamespace(cost=GivenCosts(OLD))  # type: ignore[assignment]
        attached.policy.hang(self.req_to_token_pool, self.live)
        self.forward_ct, self.idle = 7, True

    def is_fully_idle(self) -> bool:
        return self.idle

    def measures(self, constants: Constants) -> None:
        """Once the next steps were looked at."""
        self.live.timer = SimpleNamespace(collect=lambda: setattr(self.live, "learned", CostModel(constants)))  # type: ignore[assignment]

    def wait(self) -> None:
        self.now += 2 * QUIET


@pytest.fixture(autouse=True)
def parallel() -> Iterator[Any]:
    with get_parallel().override(attn_tp_group=SimpleNamespace(world_size=RANKS)):
        yield get_parallel


def test_all_ranks_choose_by_what_the_first_measured() -> None:
    first, second = OneRanksScheduler(), OneRanksScheduler()
    second.measures(Constants(9.0, 9.0, 9.0, 9.0, 9.0))  # what it measures itself does not count
    request, abort = object(), object()
    assert ranks.decide([abort], first) == [abort]
    first.measures(NEW)
    sent = ranks.decide([abort], first)
    assert sent == [abort, Decided(constants=NEW)]
    assert ranks.decide([], first) == [Decided(constants=NEW)]  # until it was heard
    for scheduler in (first, second):
        heard = [request, *sent]
        ranks.hear(scheduler, heard)
        assert heard == [request, abort]
        assert scheduler.live.policy.cost.constants == NEW
    assert ranks.decide([], first) == []
    second.live.learn()  # where a request is decided on: it still goes by what it heard
    assert second.live.policy.cost.constants == NEW


def test_a_rank_that_is_the_only_one_learns_as_it_decides() -> None:
    alone = OneRanksScheduler()
    alone.live.policy.cost = alone.live.learned
    collected: list[None] = []
    alone.live.timer = SimpleNamespace(collect=lambda: collected.append(None))  # type: ignore[assignment]
    alone.live.learn()
    assert len(collected) == 1


def test_a_step_of_finishing_is_granted_to_all_ranks_once() -> None:
    first, second = OneRanksScheduler(), OneRanksScheduler()
    for scheduler in (first, second):
        scheduler.finishing.queue.add(Prefix(array("q", range(1000)), ("n", None)))
    assert ranks.decide([], first) == []  # it was not quiet yet
    first.wait()
    first.idle = False
    assert ranks.decide([], first) == []  # something runs
    first.idle = True
    sent = ranks.decide([], first)
    assert sent == [Decided(finish_after=7)]
    second.wait()  # its clock is not asked
    for scheduler in (first, second):
        ranks.hear(scheduler, list(sent))
        assert not scheduler.finishing.is_granted(8) and not scheduler.finishing.is_granted(7)
        ranks.hear(scheduler, list(sent))
        assert scheduler.finishing.is_granted(7) and not scheduler.finishing.is_granted(7)
    first.finishing.clear()
    ranks.hear(first, list(sent))
    assert not first.finishing.is_granted(7)  # the prefix cache was emptied meanwhile


def test_a_model_on_one_rank_exchanges_nothing(parallel: Any) -> None:
    scheduler = OneRanksScheduler()
    scheduler.measures(NEW)
    with parallel().override(attn_tp_group=SimpleNamespace(world_size=1)):
        assert ranks.decide([], scheduler) == [] and ranks.model_ranks() is None
    with envs.SGLANG_CHECK_KV_PAGE_INVARIANTS.override(True):
        found = ranks.model_ranks()
    assert found is not None and found.size == RANKS and found.checked
    found = ranks.model_ranks()
    assert found is not None and not found.checked
