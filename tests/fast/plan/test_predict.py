"""Predicted times: the policy's own cost model where launching takes nothing, a simulation where it does."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.config.budget import kept_count
from claa_sglang.plan.machine import Machine
from claa_sglang.plan.pays_from import pays_from
from claa_sglang.plan.predict import GRAPH_TOKENS, Group, Predictor, Prune, overlapped
from claa_sglang.policy.cost import CostModel, prefill_work, pruned_work
from tests.fast.plan.conftest import EIGHT_B, GPU, TINY

FREE = msgspec.structs.replace(GPU, request=0.0, graph_layer=0.0, eager_layer=0.0)
lengths = st.integers(1, 120_000)
rates = st.floats(0.01, 1.0)
layers = st.integers(0, 30)


@given(st.integers(0, 60_000), st.integers(1, 60_000), layers, rates, st.sampled_from([512, 8192, 1 << 30]))
def test_where_launching_takes_nothing_it_is_the_cost_model_of_the_policy(
    prefix: int, new: int, layer: int, rate: float, chunk: int
) -> None:
    end, cost = prefix + new, CostModel(FREE.constants(EIGHT_B.layer(2)))
    head = EIGHT_B.vocabulary * EIGHT_B.hidden * 2 / FREE.bandwidth
    predictor = Predictor(FREE, EIGHT_B, chunk)
    dense = cost.seconds(prefill_work(EIGHT_B.layers, prefix, end, chunk))
    assert predictor.dense(prefix, end) - head == pytest.approx(dense)
    pruned = cost.seconds(pruned_work([layer], [kept_count(end, rate, 32)], EIGHT_B.layers, prefix, end, chunk))
    assert predictor.pruned(prefix, end, Prune(layer, rate)) - head == pytest.approx(pruned)


@given(lengths, layers, rates, rates)
def test_keeping_less_is_not_slower(tokens: int, layer: int, one: float, other: float) -> None:
    predictor = Predictor(GPU, EIGHT_B, 8192)
    less, more = (predictor.pruned(0, tokens, Prune(layer, rate)) for rate in sorted((one, other)))
    assert less <= more * (1 + 1e-9)


@given(lengths, rates, layers, layers)
def test_pruning_earlier_is_not_slower(tokens: int, rate: float, one: int, other: int) -> None:
    predictor = Predictor(FREE, EIGHT_B, 1 << 30)
    early, late = (predictor.pruned(0, tokens, Prune(layer, rate)) for layer in sorted((one, other)))
    assert early <= late * (1 + 1e-9)


@given(lengths, lengths)
def test_a_longer_prompt_is_not_faster(one: int, other: int) -> None:
    predictor, prune = Predictor(GPU, EIGHT_B, 1 << 30), Prune(15, 0.2)
    short, long = sorted((one, other))
    assert predictor.pruned(0, short, prune) <= predictor.pruned(0, long, prune) * (1 + 1e-9)


times = st.floats(0.0, 10.0)


@given(st.lists(st.builds(Group, times, times), max_size=8))
def test_device_and_host_overlap_as_in_a_simulation(groups: list[Group]) -> None:
    host = device = 0.0
    for group in groups:
        device = max(device, host) + group.device  # its first layer is launched at once
        host += group.host
    assert overlapped(groups) == pytest.approx(max(device, host))


def test_a_cpu_launches_and_computes_one_after_the_other() -> None:
    both = msgspec.structs.replace(GPU, overlaps=False, eager_layer=1.0)
    slow = Predictor(both, EIGHT_B, 8192).pruned(0, 1000, Prune(15, 0.2))
    fast = Predictor(msgspec.structs.replace(both, eager_layer=0.0), EIGHT_B, 8192).pruned(0, 1000, Prune(15, 0.2))
    assert slow - fast == pytest.approx(EIGHT_B.layers * 1.0)


def test_steps_wider_than_a_graph_are_launched_eagerly() -> None:
    """A model so small that launching is all that takes time."""
    narrow = Predictor(GPU, TINY, GRAPH_TOKENS).dense(0, 100)
    wide = Predictor(GPU, TINY, 4 * GRAPH_TOKENS)
    assert wide.dense(0, 100) == narrow
    assert wide.dense(0, GRAPH_TOKENS + 1) - GPU.request >= TINY.layers * GPU.eager_layer
    assert narrow - GPU.request < 1.1 * TINY.layers * GPU.graph_layer


def test_a_second_turn_pays_late_layers_again() -> None:
    predictor = Predictor(GPU, EIGHT_B, 8192)
    assert predictor.dense(32768, 32832) < 0.1 * predictor.dense(0, 32832)
    assert predictor.pruned(32768, 32832, Prune(15, 0.2)) > 3 * predictor.dense(32768, 32832)


@pytest.mark.parametrize("machine", [GPU, msgspec.structs.replace(GPU, eager_layer=5e-3)], ids=["fast", "slow host"])
def test_it_pays_from_where_it_is_faster(machine: Machine) -> None:
    predictor, prune = Predictor(machine, EIGHT_B, 8192), Prune(15, 0.2)
    found = pays_from(predictor, prune, 131072)
    assert found is not None

    def gain(tokens: int) -> float:
        return predictor.dense(0, tokens) - predictor.pruned(0, tokens, prune)

    assert gain(found) > 0 >= gain(found - 1)
    assert all(gain(tokens) > 0 for tokens in range(found, 131072, 997))


def test_what_never_pays_has_no_length() -> None:
    assert pays_from(Predictor(GPU, TINY, 8192), Prune(14, 0.2), 8192) is None
    assert pays_from(Predictor(FREE, EIGHT_B, 8192), Prune(15, 1.0), 131072) is None  # keeps everything
