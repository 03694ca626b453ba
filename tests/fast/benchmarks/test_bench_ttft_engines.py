"""Which engines the TTFT benchmark starts, and with which options."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from benchmarks import bench_ttft
from benchmarks.ttft import catalogue, rates, run, setup
from benchmarks.ttft.settings import CPU_DEFAULTS, GPU_DEFAULTS, Settings
from tests.fast.ttft_records import model


def options(random: bool = True, settings: Settings = GPU_DEFAULTS, names: Any = ("cold",)) -> dict[str, Any]:
    return setup.engine_options(model(random), settings, 8192, names, gpu=True)


def test_engines_have_room_for_what_they_serve() -> None:
    made = options()
    assert set(made) == {"stock", "claa", "early", "late", "one"}
    tokens = {name: own["max_total_tokens"] for name, own in made.items()}
    assert tokens["stock"] > 131_072 and tokens["claa"] > 1.2 * 131_072 and tokens["early"] > 131_072
    assert 26_214 < tokens["late"] < 40_000 and tokens["one"] == tokens["early"]
    assert set(options(names=("burst",))) == {"stock", "claa"}


def test_equal_halves_are_one_engine() -> None:
    made = options()
    assert run.same_model(made["late"], made["early"])
    assert not run.same_model(made["one"], made["early"])
    assert not run.same_model(None, made["early"])


def test_stock_is_stock() -> None:
    assert not [name for name in options()["stock"] if "claa" in name or "backend" in name or "graph" in name]


def test_random_weights_get_positions_and_a_checkpoint_gets_an_error() -> None:
    override = json.loads(options()["early"]["json_model_override_args"])
    assert override["num_hidden_layers"] == 16 and override["max_position_embeddings"] > 131_072
    with pytest.raises(ValueError, match="131072 positions, too few"):
        options(random=False)
    short = msgspec.structs.replace(GPU_DEFAULTS, lengths=[4096])
    assert "json_model_override_args" not in options(settings=short)["stock"]


def test_every_scenario_says_what_it_takes() -> None:
    for settings in (GPU_DEFAULTS, CPU_DEFAULTS):
        for name, scenario in catalogue.SCENARIOS.items():
            need = setup.demand(settings, name)
            assert need.tokens >= need.longest >= max(scenario.points(settings))
            assert bool(need.bounded) == ("late" in scenario.engines)
    for name in bench_ttft.OTHERS:
        setup.demand(GPU_DEFAULTS, name)


def test_options_become_flags() -> None:
    given = {"model_path": "m", "enable_claa": True, "claa_prune_layer": 15}
    assert rates.flags(given) == ["--model-path", "m", "--enable-claa", "--claa-prune-layer", "15"]
