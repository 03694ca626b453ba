"""Profiles for tiny models: their architecture and weights, and none of the values."""

from __future__ import annotations

from pathlib import Path

import msgspec


def write(path: Path, model: Path, weights: Path | None = None) -> Path:
    """Write a profile to `path` for the model in the directory `model`; returns `path`.

    weights: directory of the model it was measured on, if another one. No value is given, so a server with it has the
    configuration that it has without.
    """
    from transformers import AutoModelForCausalLM

    from claa_sglang.config.profile_file import Profile
    from claa_sglang.config.profile_model import describe
    from claa_sglang.offline.calibrate import profile

    loaded = AutoModelForCausalLM.from_pretrained(weights or model)
    made_for = describe(loaded.config.to_dict(), loaded.config.num_hidden_layers, model.name)
    made = Profile(version=1, model=made_for, provenance={"date": "2026-01-01", **profile.weights(loaded)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(made))
    return path
