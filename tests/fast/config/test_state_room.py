"""Which prune layers a model's KV rows leave room for: what is refused at start is what the boundary store refuses."""

from __future__ import annotations

import pytest
import torch

from claa_sglang.config.config import ConfigError
from claa_sglang.config.flags import ClaaFlags, resolve
from claa_sglang.config.state_room import Room
from claa_sglang.memory.boundary import BoundaryStore, BoundaryTooWide
from claa_sglang.offline.calibrate.candidate_layers import candidate_layers, room_in_16_bits
from claa_sglang.offline.calibrate.target import CalibrationError

SMOLLM2 = Room(num_layers=30, hidden_size=576, layer_width=2 * 3 * 64, element_bytes=2)
LLAMA_8B = Room(num_layers=32, hidden_size=4096, layer_width=2 * 8 * 128, element_bytes=2)


@pytest.mark.parametrize(
    ("room", "last"),
    [
        (SMOLLM2, 26),
        (SMOLLM2._replace(element_bytes=4), 27),
        (SMOLLM2._replace(layer_width=2 * 64), 20),  # one KV head on each of three ranks
        (LLAMA_8B, 27),
        (LLAMA_8B._replace(layer_width=2 * 128), -1),  # eight ranks
        (LLAMA_8B._replace(layer_width=8 * 4096), 30),  # never the last layer
    ],
)
def test_the_last_prune_layer(room: Room, last: int) -> None:
    assert room.last_prune_layer == last
    dtype = torch.bfloat16 if room.element_bytes == 2 else torch.float32
    own, fp8 = (room.layer_width, dtype), (room.layer_width * dtype.itemsize, torch.float8_e4m3fn)
    for prune_layer in range(room.num_layers - 1):
        for width, kind in (own, fp8):  # as many bytes
            buffers = [torch.empty(1, 1, width, dtype=kind)] * (room.num_layers - 1 - prune_layer)
            if prune_layer <= last:
                BoundaryStore(buffers, room.hidden_size, dtype)
            else:
                with pytest.raises(BoundaryTooWide):
                    BoundaryStore(buffers, room.hidden_size, dtype)


@pytest.mark.parametrize(
    ("flags", "origin"),
    [
        (ClaaFlags(prune_layer=28), "--claa-prune-layer 28: prune layer 28: "),
        (ClaaFlags(schedule="14:0.4,27:0.2"), "--claa-schedule 14:0.4,27:0.2: prune layer 27: "),
    ],
)
def test_a_prune_without_room_is_refused_with_the_last_that_has_it(flags: ClaaFlags, origin: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(flags, 30, room=SMOLLM2)
    assert str(raised.value).startswith(origin)
    assert "1,152. Prune after layer 26 or an earlier one" in str(raised.value)


def test_a_profile_and_a_default_without_room_are_refused(tmp_path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text('{"version": 1, "model": {"num_layers": 30}, "steps": [{"prune_layer": 27}]}')
    with pytest.raises(ConfigError, match=f"^--claa-profile {profile}: prune layer 27: .* layer 26 or"):
        resolve(ClaaFlags(profile=str(profile)), 30, room=SMOLLM2)
    with pytest.raises(ConfigError, match="^--claa-prune-layer, by its default: prune layer 14: .* layer 11 or"):
        resolve(ClaaFlags(), 30, room=SMOLLM2._replace(layer_width=64))
    with pytest.raises(ConfigError, match="No layer leaves more: use fewer tensor-parallel ranks"):
        resolve(ClaaFlags(), 32, room=LLAMA_8B._replace(layer_width=256))


def test_what_has_room_is_taken() -> None:
    assert resolve(ClaaFlags(prune_layer=26), 30, room=SMOLLM2).steps[0].prune_layer == 26
    assert resolve(ClaaFlags(schedule="14:0.4,26:0.2"), 30, room=SMOLLM2).steps[1].prune_layer == 26


def test_a_calibration_tries_what_a_server_takes() -> None:
    from transformers import LlamaConfig

    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    room = room_in_16_bits(LlamaConfig(**shape))
    assert room == SMOLLM2
    assert candidate_layers(None, room) == range(7, 27)
    assert candidate_layers((20, 26), room) == range(20, 27)
    with pytest.raises(CalibrationError, match="--prune-layers 20 28: give two of 0 to 26"):
        candidate_layers((20, 28), room)
    with pytest.raises(CalibrationError, match="after any layer"):
        candidate_layers(None, LLAMA_8B._replace(layer_width=256))
