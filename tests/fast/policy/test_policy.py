"""Which way a prompt takes, on a machine whose constants are about those of an H200 and an 8B model."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.forward.batch_plan import plan_extend
from claa_sglang.patches.policy import _graph_tokens, time_prefill, work_of
from claa_sglang.policy.cost import Constants, CostModel, Work, span_work
from claa_sglang.policy.policy import Hits, Policy
from claa_sglang.policy.step_timer import StepTimer
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState

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

    def turn(self, prompt: list[int]) -> float:
        """Seconds of the way that is taken."""
        hits = Hits(*(self.hit(prompt, way) for way in ("dense", "pruned")))
        choice = self.policy.choose(len(prompt), (STEP,), hits, lambda: self.policy.note(prompt, "", hits))
        prune = choice.prune and self.auto
        assert choice.reason.startswith("pruned is faster" if choice.prune else "dense")
        self.ways.append("pruned" if prune else "dense")
        self.cached[self.ways[-1]].append(np.array(prompt))
        work = (
            self.policy._pruned((STEP,), hits.pruned, len(prompt))
            if prune
            else self.policy._dense(hits.dense, len(prompt))
        )
        return self.policy.cost.seconds(work)

    def hit(self, prompt: list[int], way: str) -> int:
        shared = 0
        for known in self.cached[way]:
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
    assert not World().policy.choose(50_000, (step,), Hits(0, 0), lambda: 0).prune


@pytest.mark.parametrize(("graph_tokens", "prunes"), [(CHUNK, False), (0, True)])
def test_a_model_that_launching_holds_up_is_not_pruned_where_dense_runs_in_graphs(
    graph_tokens: int, prunes: bool
) -> None:
    """SmolLM2-135M on an H200: 8K tokens are computed faster than its kernels are launched one by one."""
    small = Constants(per_pass=5e-5, per_row=2e-8, per_pair=3e-12, per_prune=3e-4, per_eager=4e-4)
    policy = Policy(CONFIG, CostModel(small), CHUNK, lambda: graph_tokens)
    choice = policy.choose(7900, (STEP,), Hits(0, 0), lambda: 0)
    assert choice.prune == prunes, choice.reason


def test_what_launching_takes_is_learned_from_pruned_steps() -> None:
    """Expected to be too dear, pruning is taken up once a few steps have shown that it is not."""
    truth = H200._replace(per_eager=1e-5)
    policy = Policy(CONFIG, CostModel(H200._replace(per_eager=2e-3)), CHUNK, lambda: CHUNK)
    assert not policy.choose(4096, (STEP,), Hits(0, 0), lambda: 0).prune
    for tokens in (4096, 32_768, 10_000, 20_000):
        for work in (policy._dense(0, tokens), policy._pruned((STEP,), 0, tokens)):
            policy.cost.observe(work, float(np.dot(work, truth)))
    assert policy.choose(4096, (STEP,), Hits(0, 0), lambda: 0).prune


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
    )
    live = SimpleNamespace(config=CONFIG, timer=StepTimer(Cost(), torch.device("cpu")))
    runner = SimpleNamespace(req_to_token_pool=SimpleNamespace(claa_policy=live))
    output = SimpleNamespace(can_run_graph=in_graph)
    assert time_prefill(lambda *_: output, runner, batch) is output
    (work,) = seen
    assert (work.passes, work.rows, work.eager) == (32, 32 * 12, 0 if in_graph else 32)


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
    state.late_spans = [(50, 50), (8, 20)]
    plan = plan_extend(
        [state], rows=[1], prefix_lens=[99], extend_lens=[1], last_chunk=[True], table_stride=4, num_steps=2
    )
    batch = SimpleNamespace(model_specific_states={"claa": plan})
    expected = span_work(4, 99, 100).plus(span_work(2, 8, 20))
    assert work_of(batch, config) == expected._replace(prunes=1)
