"""What the policy is told of a request, on SGLang's own request, prefix cache and queue order, without a server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_policy import AddReqResult, CacheAwarePolicy, PrefillAdder, SchedulePolicy

from claa_sglang.memory.late_slots import LateSlots
from claa_sglang.patches import admission, attached
from claa_sglang.patches.policy import choose_way, match_where_it_goes, start_step
from tests.fast.patches.world import CONFIG, PROMPT, World


def test_samples_go_the_way_of_the_prompt_that_was_sent_ahead() -> None:
    world = World()
    start_step(world.tree)
    assert world.admit(world.request(PROMPT, n=8, new=0)) == "dense"
    world.cache(PROMPT, pruned=False)
    start_step(world.tree)
    samples = [world.request(PROMPT, n=8) for _ in range(8)]
    assert [world.admit(req) for req in samples] == ["dense"] * 8
    assert {req.prefix_len for req in samples} == {1499}
    assert all("for all 8 samples" in attached.state.of(req).plan.dense_reason for req in samples)


def test_samples_that_go_pruned_do_not_turn_dense_one_by_one() -> None:
    world = World()
    start_step(world.tree)
    assert world.admit(world.request(PROMPT, n=20, new=0, rate=0.01)) == "pruned"
    world.cache(PROMPT, pruned=True)
    start_step(world.tree)
    samples = [world.request(PROMPT, n=20, rate=0.01) for _ in range(20)]
    assert [world.admit(req) for req in samples] == ["pruned"] * 20


def test_equal_requests_of_a_step_wait_for_the_first() -> None:
    world = World()
    start_step(world.tree)
    first, *others = [world.request(PROMPT) for _ in range(7)]
    assert world.admit(first) == "pruned"
    assert [world.admit(req) for req in others] == ["waits"] * 6
    assert not any(attached.state.of(req).decision.why is None for req in others)
    first.output_ids.append(1)  # its prefill ended
    world.cache(PROMPT, pruned=True)
    start_step(world.tree)
    assert [world.admit(req) for req in others] == ["pruned"] * 6
    assert min(req.prefix_len for req in others) >= 1500 - CONFIG.window


def test_nobody_waits_for_a_request_that_is_gone() -> None:
    world = World()
    start_step(world.tree)
    world.admit(world.request(PROMPT))
    late = world.request(PROMPT)
    assert world.way(late) == "waits"
    start_step(world.tree)  # the first has no row: it was aborted
    assert world.way(late) == "pruned"


def test_a_request_that_was_sent_the_dense_way_waits_as_well() -> None:
    world = World()
    start_step(world.tree)
    prompt = PROMPT[:1100]
    left, right = (world.request(prompt, n=1, new=0) for _ in range(2))
    assert world.way(left) == "dense"  # and there was no room for it in that step
    assert world.admit(right) == "dense"
    assert world.way(left) == "waits"
    right.output_ids.append(1)
    world.cache(prompt, pruned=False)
    start_step(world.tree)
    assert world.way(left) == "dense" and left.prefix_len == 1099


def test_without_a_prefix_cache_only_the_prompt_s_own_cost_decides() -> None:
    prompt = PROMPT[:300]
    assert World().way(World().request(prompt, rate=0.5)) == "dense"
    world = World(disable=True)
    start_step(world.tree)
    for _ in range(3):  # and nobody waits for what will not be there
        req = world.request(prompt, rate=0.5)
        assert world.admit(req) == "pruned"
        assert "nothing is cached for later" in attached.state.of(req).decision.why


def test_a_request_whose_kv_is_not_cached_is_decided_on_alone_and_waited_for_by_nobody() -> None:
    world = World()
    start_step(world.tree)
    alone = world.request(PROMPT[:300], rate=0.5)
    alone.skip_radix_cache_insert = True
    assert world.admit(alone) == "pruned"
    assert world.way(world.request(PROMPT[:300], rate=0.5)) != "waits"


def test_hits_that_sglang_does_not_use_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.cache(PROMPT, pruned=False)
    assert world.way(world.request(PROMPT)) == "dense"
    assert world.way(world.request(PROMPT, logprobs_from=1400)) == "dense"
    # Its input log probabilities need all rows but five.
    assert world.way(world.request(PROMPT, logprobs_from=5)) == "pruned"
    monkeypatch.setenv("SGLANG_RADIX_FORCE_MISS", "1")
    assert world.way(world.request(PROMPT)) == "pruned"


def test_the_queue_is_sorted_by_what_is_cached_either_way() -> None:
    world = World()
    world.cache(PROMPT, pruned=False)
    other = [7] * 1500
    world.cache(other[:700], pruned=True)
    policy = SchedulePolicy("lpm", world.tree, False, False, False)
    requests = [world.request([9] * 1500), world.request(other), world.request(PROMPT)]
    match_where_it_goes(SchedulePolicy._compute_prefix_matches, policy, requests, CacheAwarePolicy.LPM)
    assert [req.num_matched_prefix_tokens for req in requests] == [0, 700, 1499]
    assert {req.extra_key for req in requests} == {CONFIG.namespace}


def test_who_waits_stays_in_the_queue_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through SGLang's own prefill adder, as its scheduler goes through the queue."""
    world = World()
    stock = world.pool.req_to_token
    table = torch.zeros((2 * stock.shape[0], stock.shape[1]), dtype=stock.dtype)
    world.pool.attach_aux_cache(LateSlots(table, stock.shape[0], world.allocator, evict=lambda _: None))
    monkeypatch.setattr(admission, "config_of", lambda _: CONFIG)
    scheduler = SimpleNamespace(server_args=None, req_to_token_pool=world.pool)
    monkeypatch.setattr(PrefillAdder, "_replay_len", lambda *_: 0)  # asks the published server arguments
    adder_class = admission.make_adder(PrefillAdder, scheduler)
    queue = [world.request(PROMPT) for _ in range(3)] + [world.request([9] * 1500)]
    for step, expected in enumerate(([queue[0], queue[3]], queue[1:3])):
        adder = adder_class(1, world.tree, world.allocator, None, 0.5, 16_384, 8192)
        for req in queue:
            if not req.output_ids:
                choose_way(req, world.tree)
                req.init_next_round_input(world.tree)
                assert adder.add_one_req(req, False, None) is AddReqResult.CONTINUE
        assert adder.can_run_list == expected, step
        for req in adder.can_run_list:
            req.output_ids.append(1)
            world.cache(list(req.origin_input_ids), pruned=True)
