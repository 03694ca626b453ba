"""What hangs on decoder layers or asks which one runs sees each late layer on its own rows, once.

One server of a tiny model with experts has it all: forward hooks, tensor dumps and the recorder of experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS
from tests.engine.conftest import CLAA_FLAGS
from tests.engine_server import Server, second_plugin, server
from tests.tiny_models import EXPERTS, EXPERTS_PER_TOKEN, MAX_POSITIONS, NUM_LAYERS, prompt

pytestmark = pytest.mark.engine

PRUNES = (3, 5)
TOKENS = 200
KEPT = (100, 40)  # after each prune
# Rows of each layer in the one forward of a prompt that fits its chunk.
PRUNED_ROWS = [TOKENS] * 4 + [KEPT[0]] * 2 + [KEPT[1]] * 2
HOOKS = """
import json


def register():
    import torch

    # The recorder asks it, and there is no driver here that could answer.
    torch.cuda.is_current_stream_capturing = lambda: False


def record(config):
    def hook(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        line = [config["layer"], inputs[1].shape[0], hidden.shape[0], hidden.double().norm().item()]
        with open(config["file"], "a") as file:
            print(json.dumps(line), file=file)

    return hook
"""


@dataclass(frozen=True)
class Recorded:
    """What one request left: `hooks` as (layer, rows in, rows out, norm); `dumps`, one dictionary per forward;
    `experts`, choices counted per layer."""

    hooks: list[tuple[int, int, int, float]]
    dumps: list[dict[str, torch.Tensor]]
    experts: list[int]


def of_layers(dump: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The first output of every module within a decoder layer."""
    firsts = {name: value[0] if isinstance(value, list) else value for name, value in dump.items()}
    return {name: value for name, value in firsts.items() if name.startswith("model.layers.")}


@dataclass(frozen=True)
class Recording:
    server: Server
    home: Path

    def ask(self, claa: dict[str, Any], seed: int, new: int = 1) -> Recorded:
        """Record one request over a prompt that nobody asked before."""
        hooks = self.home / "hooks"
        hooks.write_text("")
        dumped = set(self.home.rglob("Pass*.pt"))
        assert self.server.post("/start_expert_distribution_record").status_code == 200
        params = {"max_new_tokens": new, "ignore_eos": True, "custom_params": {"claa": claa}}
        answer = self.server.generate(input_ids=prompt(TOKENS, seed), sampling_params=params)
        assert answer["meta_info"]["claa"]["pruned"] == (claa != {"enabled": False})
        assert self.server.post("/stop_expert_distribution_record").status_code == 200
        assert self.server.post("/dump_expert_distribution_record").status_code == 200
        self.server.flush()  # the next record is another request's alone
        (counted,) = self.home.glob("expert_distribution_recorder_*.pt")
        counts = torch.load(counted, weights_only=False)["logical_count"]
        counted.unlink()
        return Recorded(
            [tuple(json.loads(line)) for line in hooks.read_text().splitlines()],
            [of_layers(torch.load(file)) for file in sorted(set(self.home.rglob("Pass*.pt")) - dumped)],
            counts.sum(dim=(0, 2)).tolist(),
        )


@pytest.fixture(scope="module")
def recording(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    home = tmp_path_factory.mktemp("recorded")
    specs = [
        {
            "name": f"layer {layer}",
            "target_modules": [f"model.layers.{layer}"],
            "hook_factory": "claa_test_recording:record",
            "config": {"layer": layer, "file": str(home / "hooks")},
        }
        for layer in range(NUM_LAYERS)
    ]
    flags = (
        *("--claa-schedule", f"{PRUNES[0]}:0.5,{PRUNES[1]}:0.2", "--forward-hooks", json.dumps(specs)),
        *("--debug-tensor-dump-output-folder", str(home), "--expert-distribution-recorder-mode", "stat"),
    )
    env = {
        **second_plugin(tmp_path_factory.mktemp("plugin"), "claa_test_recording", HOOKS),
        **{"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(home)},
        **STRICT,
        **ONE_THREAD,
    }
    with server(tiny_model(EXPERTS), *CLAA_FLAGS, *TINY_FLAGS, *flags, env=env) as running:
        yield Recording(running, home)


def test_keeping_everything_is_seen_as_dense(recording: Recording) -> None:
    """The same rows and values at every layer, in as many calls."""
    dense, everything = (recording.ask(claa, seed=2) for claa in ({"enabled": False}, {"keep_rate": 1}))
    assert [line[:3] for line in dense.hooks] == [(i, TOKENS, TOKENS) for i in range(NUM_LAYERS)]
    assert everything.hooks == dense.hooks
    assert everything.experts == dense.experts == [TOKENS * EXPERTS_PER_TOKEN] * NUM_LAYERS
    for ours, stock in zip(everything.dumps, dense.dumps, strict=True):
        assert ours.keys() == stock.keys() and f"model.layers.{NUM_LAYERS - 1}.mlp.gate" in ours
        for name, tensor in stock.items():
            assert torch.equal(ours[name], tensor), name


def test_each_layer_is_seen_with_its_own_rows(recording: Recording) -> None:
    found = recording.ask({}, seed=3)
    assert [line[:3] for line in found.hooks] == [(i, rows, rows) for i, rows in enumerate(PRUNED_ROWS)]
    assert found.experts == [rows * EXPERTS_PER_TOKEN for rows in PRUNED_ROWS]
    (dump,) = found.dumps
    norms = [dump[f"model.layers.{i}.self_attn.q_norm"].shape for i in range(NUM_LAYERS)]
    assert [shape[0] for shape in norms] in (PRUNED_ROWS, [4 * rows for rows in PRUNED_ROWS])  # one row a head


def test_decoding_is_seen_once_at_every_layer(recording: Recording) -> None:
    found = recording.ask({}, seed=4, new=3)
    decoding = [(i, 1, 1) for i in range(NUM_LAYERS)]
    assert [line[:3] for line in found.hooks[NUM_LAYERS:]] == 2 * decoding
    assert found.experts == [(rows + 2) * EXPERTS_PER_TOKEN for rows in PRUNED_ROWS]


def test_the_late_rows_of_the_table_are_counted(recording: Recording) -> None:
    """Here, as this server prunes twice: rows for 32 requests and padding, SGLang's 4 columns more."""
    columns = recording.server.get("/server_info").json()["context_length"] or MAX_POSITIONS
    assert f"late rows of the request table take {2 * 33 * (columns + 4) * 4} bytes" in recording.server.log()
