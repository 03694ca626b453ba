"""Which way a prompt takes, on a machine whose constants are about those of an H200 and an 8B model."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.forward.batch_plan import plan_extend
from claa_sglang.patches import attached
from claa_sglang.patches.policy import _graph_tokens, time_prefill, work_of
from claa_sglang.policy.cost import Constants, CostModel, Work, span_work
from claa_sglang.policy.policy import Choice, Flight, Hits, Policy, Prompt
from claa_sglang.policy.step_timer import StepTimer
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState
from claa_sglang.shadow.running import RID

STEP = PruneStep(prune_layer=15, keep_rate=0.2, score_layers=(12, 13, 14, 15))
CONFIG = ClaaConfig(steps=(STEP,), num_layers=32)
CHUNK = 8192
# 16 ms for a forward of few rows, 210 ms for 8,192 rows without a prefix, 10 s for 131,072.
H200 = Constants(per_pass=5e-4, per_row=7.2e-7, per_pair=2.7e-11, per_prune=1e-3)


class World:
    """A server with one policy and an endless prefix cache of one conversation or document."""

    def __init__(self, auto: bool = True) -> None:
        self.policy = Policy(CONFIG, CostModel(H200), CHUNK)
        self.cached: dict[str, list[np.ndarray]] = {"dense": [], "pruned": []}
        self.auto, self.ways = auto, []
        self.new, self.step, self.soon = 0, 0, True

    def turn(self, prompt: list[int], **known: Any) -> float:
        """Seconds of the way that a prompt takes that arrives alone."""
        return self.arrive([prompt], **known)

    def arrive(self, prompts: list[list[int]], **known: Any) -> float:
        """Seconds of prompts that arrive at once: each step admits all that do not wait, and ends their prefills."""
        seconds = 0.0
        while prompts:
            self.step += 1
            in_flight: dict[str, list[np.ndarray]] = {"dense": [], "pruned": []}
            waiting = []
            for prompt in prompts:
                hits = Hits(*(self.hit(prompt, way, self.cached) for way in ("dense", "pruned")))
                flight = Flight(*(self.hit(prompt, way, in_flight) for way in ("dense", "pruned")), self.soon)
                choice = self.choose(prompt, hits, flight, known)
                if choice.wait and self.auto:
                    waiting.append(prompt)
                    continue
                prune = choice.prune and self.auto
                self.ways.append("pruned" if prune else "dense")
                in_flight[self.ways[-1]].append(np.array(prompt))
                self.new += len(prompt) - (hits.pruned if prune else hits.dense)
                pruned = self.policy._pruned((STEP,), hits.pruned, len(prompt))
                dense = self.policy._dense(hits.dense, len(prompt))
                seconds += self.policy.cost.seconds(pruned if prune else dense)
            for way, prefills in in_flight.items():
                self.cached[way] += prefills
            assert len(waiting) < len(prompts)
            prompts = waiting
        return seconds

    def choose(self, prompt: list[int], hits: Hits, flight: Flight, known: dict[str, Any]) -> Choice:
        def uses() -> float:
            return self.policy.note(prompt, "", hits, self.step)

        choice = self.policy.choose(Prompt(len(prompt), (STEP,), hits, uses, flight, **known))
        assert choice.reason.startswith("pruned is faster" if choice.prune else "dense")
        return choice

    @staticmethod
    def hit(prompt: list[int], way: str, cached: dict[str, list[np.ndarray]]) -> int:
        shared = 0
        for known in cached[way]:
            length = min(len(known), len(prompt))
            differ = np.flatnonzero(known[:length] != np.array(prompt[:length]))
            shared = max(shared, int(differ[0]) if differ.size else length)
        return min(shared, len(prompt) - (CONFIG.window if way == "pruned" else 1))


def chat(world: World, first: int, last: int, turns: int) -> float:
    lengths = [first + (last - first) * i // turns for i in range(turns + 1)]
    return sum(world.turn([1] * length) for length in lengths)


@pytest.mark.parametrize("tokens", [4096, 10_240, 131_072])
def test_a_long_cold_prompt_is_pruned(tokens: int) -> None:
    world = World()
    assert world.turn([1] * tokens) < 0.7 * World(auto=False).turn([1] * tokens)
    assert world.ways == ["pruned"]


@pytest.mark.parametrize("tokens", [600, 1030])
def test_a_short_first_turn_is_dense_as_it_may_be_followed_up(tokens: int) -> None:
    """Pruning it gains less than computing it once more, times how often that happens."""
    world = World()
    world.turn([1] * tokens)
    assert world.ways == ["dense"]


@pytest.mark.parametrize("first", [500, 1030, 1500, 2100])
def test_a_growing_chat_costs_no_more_than_stock(first: int) -> None:
    world = World()
    assert chat(world, first, 32_000, 60) <= 1.02 * chat(World(auto=False), first, 32_000, 60)
    assert world.ways[-50:] == ["dense"] * 50


@pytest.mark.parametrize("questions", [2, 6])
@pytest.mark.parametrize("text", [1500, 4000, 16_000])
def test_a_few_questions_over_a_text_compute_no_more_new_tokens_than_stock(text: int, questions: int) -> None:
    """One after the other: none of them pays the text again, as it is not a conversation that grows."""
    world, stock = World(), World(auto=False)
    prompts = [[1] * text + [2 + question] * 64 for question in range(questions)]
    assert sum(map(world.turn, prompts)) <= 1.05 * sum(map(stock.turn, prompts))
    assert world.new <= stock.new + CONFIG.window * questions


# --- what arrives at once ---

ONE_PROMPT = [1] * 4000


def test_equal_prompts_at_once_compute_theirs_once() -> None:
    world = World()
    world.arrive([ONE_PROMPT] * 8)
    assert world.ways == ["pruned"] * 8 and world.new == 4000 + 7 * CONFIG.window


def test_short_equal_prompts_at_once_wait_for_the_dense_one() -> None:
    world = World()
    world.arrive([[1] * 1030] * 8)
    assert world.ways == ["dense"] * 8 and world.new == 1030 + 7


@pytest.mark.parametrize("at_once", [1, 7, 50])
def test_a_prompt_that_is_repeated_once_is_not_charged_ten_times(at_once: int) -> None:
    world = World()
    world.turn(ONE_PROMPT)
    world.arrive([ONE_PROMPT] * at_once)
    assert world.ways == ["pruned"] * (1 + at_once) and world.new == 4000 + at_once * CONFIG.window


def test_questions_at_once_over_a_document_in_the_cache_are_pruned() -> None:
    world = World()
    world.turn(ONE_PROMPT + [2] * 20)
    world.arrive([ONE_PROMPT + [3 + agent] * 20 for agent in range(7)])
    assert world.ways == ["pruned"] * 8


def used_often(soon: bool) -> World:
    """A document about which so much was asked that the next question would compute it dense."""
    world = World()
    world.soon = soon
    while "dense" not in world.ways:
        world.turn(ONE_PROMPT + [len(world.ways) + 2] * 20)
    world.cached["dense"].clear()
    world.ways.clear()
    world.new = 0
    return world


def test_one_of_a_step_computes_a_document_dense_and_the_others_wait_for_it() -> None:
    world = used_often(soon=True)
    world.arrive([ONE_PROMPT + [900 + question] * 20 for question in range(7)])
    assert world.ways == ["dense"] * 7 and world.new == 4020 + 6 * 20


def test_or_go_pruned_while_that_takes_longer_than_the_step() -> None:
    world = used_often(soon=False)
    world.arrive([ONE_PROMPT + [900 + question] * 20 for question in range(7)])
    # A question is shorter than the window, which a pruned prompt computes again.
    assert world.ways == ["dense"] + ["pruned"] * 6 and world.new == 4020 + 6 * CONFIG.window


def test_nobody_waits_for_a_small_share() -> None:
    """And what is not waited for does not count: it is computed again."""
    for length, shared, hits in ((5500, 1500, Hits(0, 0)), (1030, 100, Hits(0, 0)), (1030, 100, Hits(0, 20))):
        alone, beside = (
            World().choose([1] * length, hits, flight, {}) for flight in (Flight(), Flight(shared, shared, True))
        )
        assert beside == alone and not alone.wait


@pytest.mark.parametrize(("samples", "way"), [(1, "pruned"), (8, "dense")])
def test_the_prompt_of_many_samples_is_computed_the_way_that_is_best_for_all(samples: int, way: str) -> None:
    world = World()
    world.turn(ONE_PROMPT, samples=samples, answers=samples == 1)
    assert world.ways == [way]


@pytest.mark.parametrize(("samples", "way"), [(1, "pruned"), (8, "dense")])
def test_a_system_prompt_in_the_cache_changes_nothing_of_that(samples: int, way: str) -> None:
    world = World()
    world.turn([1] * 200 + [2] * 4000)
    world.turn([1] * 200 + [3] * 4000, samples=samples, answers=samples == 1)
    assert world.ways == ["pruned", way]


def test_a_prompt_that_was_sent_to_be_cached_will_be_used() -> None:
    world = World()
    world.turn(ONE_PROMPT, answers=False)
    assert world.ways == ["dense"]


@pytest.mark.parametrize(("samples", "prunes"), [(4, True), (20, False)])
def test_how_many_samples_there_are_counts(samples: int, prunes: bool) -> None:
    step = PruneStep(prune_layer=15, keep_rate=0.05, score_layers=(15,))
    prompt = Prompt(4000, (step,), Hits(0, 0), samples=samples, answers=False)
    assert World().policy.choose(prompt).prune == prunes


def test_a_short_first_turn_after_a_system_prompt_is_dense_too() -> None:
    world = World()
    world.turn([1] * 20 + [2] * 4000)
    world.turn([1] * 20 + [3] * 1010)
    assert world.ways == ["pruned", "dense"]


def test_samples_go_the_way_of_the_first() -> None:
    world = World()
    for way in (Choice(True, "pruned is faster, as it was"), Choice(False, "dense, as it was")):
        for hits in (Hits(3999, 0), Hits(0, 3992)):
            assert world.choose(ONE_PROMPT, hits, Flight(), {"samples": 8, "way": way}) == way


@pytest.mark.parametrize("tokens", [300, 1030])
def test_where_nothing_is_cached_for_later_only_this_prompt_decides(tokens: int) -> None:
    """At the cost of a machine that is bound by arithmetic, where any prompt gains."""
    policy = Policy(CONFIG, CostModel(Constants(1e-9, 1e-6, 1e-11, 1e-9)), CHUNK)
    step = PruneStep(prune_layer=15, keep_rate=0.5, score_layers=(15,))
    prompt = Prompt(tokens, (step,), Hits(0, 0))
    assert policy.choose(prompt).reason.startswith("dense, cached for later")
    assert policy.choose(prompt._replace(lasting=False)).prune


def test_a_chat_over_a_long_document_never_costs_more_than_twice_stock() -> None:
    stock = chat(World(auto=False), 16_000, 32_000, 60)
    assert chat(World(), 16_000, 32_000, 60) <= 2 * stock


def test_a_few_questions_over_a_long_document_stay_pruned() -> None:
    world = World()
    for question in range(5):
        world.turn([1] * 32_768 + [2 + question] * 64)
    assert world.ways == ["pruned"] * 5


def test_many_questions_over_a_document_end_dense_and_cached() -> None:
    world, stock = World(), World(auto=False)
    prompts = [[1] * 32_768 + [2 + question] * 64 for question in range(60)]
    total = sum(map(world.turn, prompts))
    assert world.ways[0] == "pruned" and set(world.ways[-30:]) == {"dense"}
    assert total <= 2 * sum(map(stock.turn, prompts))


def test_dense_over_a_dense_prefix() -> None:
    world = World(auto=False)
    world.turn([1] * 10_000)
    world.auto = True
    world.turn([1] * 10_200)
    assert world.ways == ["dense", "dense"]


def test_a_keep_rate_of_one_never_pays() -> None:
    step = PruneStep(prune_layer=15, keep_rate=1.0, score_layers=(15,))
    assert not World().policy.choose(Prompt(50_000, (step,), Hits(0, 0))).prune


@pytest.mark.parametrize(("graph_tokens", "prunes"), [(CHUNK, False), (0, True)])
def test_a_model_that_launching_holds_up_is_not_pruned_where_dense_runs_in_graphs(
    graph_tokens: int, prunes: bool
) -> None:
    """SmolLM2-135M on an H200: 8K tokens are computed faster than its kernels are launched one by one."""
    small = Constants(per_pass=5e-5, per_row=2e-8, per_pair=3e-12, per_prune=3e-4, per_eager=4e-4)
    policy = Policy(CONFIG, CostModel(small), CHUNK, lambda: graph_tokens)
    choice = policy.choose(Prompt(7900, (STEP,), Hits(0, 0)))
    assert choice.prune == prunes, choice.reason


def test_what_launching_takes_is_learned_from_pruned_steps() -> None:
    """Expected to be too dear, pruning is taken up once a few steps have shown that it is not."""
    truth = H200._replace(per_eager=1e-5)
    policy = Policy(CONFIG, CostModel(H200._replace(per_eager=2e-3)), CHUNK, lambda: CHUNK)
    assert not policy.choose(Prompt(4096, (STEP,), Hits(0, 0))).prune
    for tokens in (4096, 32_768, 10_000, 20_000):
        for work in (policy._dense(0, tokens), policy._pruned((STEP,), 0, tokens)):
            policy.cost.observe(work, float(np.dot(work, truth)))
    assert policy.choose(Prompt(4096, (STEP,), Hits(0, 0))).prune


@pytest.mark.parametrize("in_graph", [True, False])
def test_a_step_in_a_graph_teaches_nothing_of_launching(in_graph: bool) -> None:
    """On a GPU alone; the CPU engine has no prefill graphs."""
    seen = []

    class Cost:
        def observe(self, work: Work, seconds: float) -> None:
            seen.append(work)

    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: True),
        model_specific_states={},
        extend_prefix_lens_cpu=[10, 0],
        extend_seq_lens_cpu=[5, 7],
        rids=["r", "s"],
    )
    live = SimpleNamespace(config=CONFIG, timer=StepTimer(Cost(), torch.device("cpu")))
    runner = SimpleNamespace(req_to_token_pool=SimpleNamespace())
    attached.policy.hang(runner.req_to_token_pool, live)
    output = SimpleNamespace(can_run_graph=in_graph)
    assert time_prefill(lambda *_: output, runner, batch) is output
    (work,) = seen
    assert (work.passes, work.rows, work.eager) == (32, 32 * 12, 0 if in_graph else 32)
    batch.rids = ["r", f"{RID}1"]  # a shadow request has more logits than others
    assert time_prefill(lambda *_: output, runner, batch) is output and len(seen) == 1


def test_what_prefill_graphs_hold_is_read_from_sglang_s_runner() -> None:
    runner = SimpleNamespace(prefill_cuda_graph_runner=SimpleNamespace(max_num_tokens=4096))
    assert _graph_tokens(runner) == 4096
    assert _graph_tokens(SimpleNamespace(prefill_cuda_graph_runner=None)) == 0
    source = inspect.getsource(sys.modules[PrefillCudaGraphRunner.__module__])
    assert "self.max_num_tokens = " in source  # of the installed SGLang, whose runner a CPU cannot make


def test_a_part_after_the_second_prune_is_work_of_the_last_layers_alone() -> None:
    """Beside the last token, once more, in the early ones; layers between the prunes are not run."""
    steps = [
        {"prune_layer": 3, "keep_rate": 0.5, "score_layers": [3]},
        {"prune_layer": 5, "keep_rate": 0.2, "score_layers": [5]},
    ]
    config = msgspec.convert({"steps": steps, "num_layers": 8}, ClaaConfig)
    state = RequestState.pruned_request(RequestOptions(), config, prompt_tokens=100)
    state.progress.late_spans = [(50, 50), (8, 20)]
    plan = plan_extend(
        [state], rows=[1], prefix_lens=[99], extend_lens=[1], last_chunk=[True], table_stride=4, num_steps=2
    )
    batch = SimpleNamespace(model_specific_states={"claa": plan})
    expected = span_work(4, 99, 100).plus(span_work(2, 8, 20))
    assert work_of(batch, config) == expected._replace(prunes=1)


def test_a_step_of_finishing_is_work_of_the_late_layers_alone() -> None:
    state = RequestState.pruned_request(RequestOptions(keep_rate=1.0), CONFIG, prompt_tokens=100)
    state.progress.late_spans, state.progress.borrowed = [(60, 100)], torch.arange(100)
    plan = plan_extend(
        [state], rows=[1], prefix_lens=[99], extend_lens=[1], last_chunk=[True], table_stride=4, num_steps=1
    )
    batch = SimpleNamespace(model_specific_states={"claa": plan})
    assert work_of(batch, CONFIG) == span_work(16, 60, 100)._replace(prunes=1)
