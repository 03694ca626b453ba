"""What a server says at its start when nobody chose its layers: that they are defaults, and how to choose them."""

from __future__ import annotations

import shlex
from pathlib import Path

from msgspec import UNSET

from claa_sglang.config.config import ClaaConfig
from claa_sglang.config.flags import ClaaFlags
from claa_sglang.config.profile_file import ProfileStep, load_profile


def layer_warning(flags: ClaaFlags, config: ClaaConfig, model_path: str) -> str | None:
    """The warning for a server of `model_path` that `flags` made `config` of; None where its layers were chosen.

    Chosen is what a flag or the profile gives, even `--claa-score-layers 4` or the layers that happen to be the
    defaults. Only layers that are defaults are named. Raises ConfigError if the profile has become unreadable.
    """
    parts = []
    if scored := _scored_by_default(flags, config):
        parts.append(f"layers {scored} rank the prompt tokens")
    if _pruned_by_default(flags, config):
        parts.append(f"tokens are dropped after layer {config.steps[0].prune_layer}")
    if not parts:
        return None
    profile = f"{Path(model_path).name or 'model'}.claa.json"
    calibrate = shlex.join(["claa-sglang", "calibrate", "--model", model_path, "--out", profile])
    return (
        f"claa-sglang: {' and '.join(parts)} (of {config.num_layers} layers) by default, not because they suit this "
        "model: answers can suffer. Choose layers by measurement, with\n"
        f"    {calibrate}\n"
        "and start the server with\n"
        f"    --enable-claa {shlex.join(['--claa-profile', profile])}"
    )


def _scored_by_default(flags: ClaaFlags, config: ClaaConfig) -> str:
    """The scored layers that nobody chose, as text; empty if all were chosen."""
    if flags.schedule is not None:
        # Each part is layer:rate, or layer:rate:scored.
        parts = zip(flags.schedule.split(","), config.steps, strict=True)
        steps = [step for text, step in parts if text.count(":") < 2]
    elif flags.score_layers is None and _first_step(flags, config).score_layers is UNSET:
        steps = [config.steps[0]]
    else:
        steps = []
    return ",".join(str(layer) for step in steps for layer in step.score_layers)


def _pruned_by_default(flags: ClaaFlags, config: ClaaConfig) -> bool:
    if flags.schedule is not None or flags.prune_layer is not None:
        return False
    return _first_step(flags, config).prune_layer is UNSET


def _first_step(flags: ClaaFlags, config: ClaaConfig) -> ProfileStep:
    """The only step of a profile that may leave something out; one that leaves out everything without a profile."""
    steps = () if flags.profile is None else load_profile(flags.profile, config.num_layers).steps
    return steps[0] if steps else ProfileStep()
