"""What a server says at its start when nobody chose its layers: that they are defaults, and how to choose them."""

from __future__ import annotations

import shlex
from pathlib import Path

from msgspec import UNSET

from claa_sglang.config.config import ClaaConfig
from claa_sglang.config.flags import ClaaFlags
from claa_sglang.config.profile_file import Profile, ProfileStep


def layer_warning(flags: ClaaFlags, config: ClaaConfig, profile: Profile | None, model_path: str) -> str | None:
    """The warning for a server of `model_path` that `flags` and `profile` made `config` of; None where its layers were
    chosen.

    Chosen is what a flag or the profile gives, even `--claa-score-layers 4` or the layers that happen to be the
    defaults. Only layers that are defaults are named.
    """
    given = profile.steps[0] if profile is not None and profile.steps else ProfileStep()
    parts = []
    if scored := _scored_by_default(flags, config, given):
        parts.append(f"layers {scored} rank the prompt tokens")
    if _pruned_by_default(flags, given):
        parts.append(f"tokens are dropped after layer {config.steps[0].prune_layer}")
    if not parts:
        return None
    return (
        f"claa-sglang: {' and '.join(parts)} (of {config.num_layers} layers) by default, not because they suit this "
        f"model: answers can suffer. Choose layers by measurement, with\n{remedy(model_path)}"
    )


def remedy(model_path: str) -> str:
    """The command that makes a profile of `model_path`, and how a server gets it, as the end of a warning."""
    profile = f"{Path(model_path).name or 'model'}.claa.json"
    calibrate = shlex.join(["claa-sglang", "calibrate", "--model", model_path, "--out", profile])
    return (
        f"    {calibrate}\n"
        "and start the server again, which finds the profile by itself, or on another machine with\n"
        f"    --enable-claa {shlex.join(['--claa-profile', profile])}"
    )


def _scored_by_default(flags: ClaaFlags, config: ClaaConfig, given: ProfileStep) -> str:
    """The scored layers that nobody chose, as text; empty if all were chosen."""
    if flags.schedule is not None:
        # Each part is layer:rate, or layer:rate:scored.
        parts = zip(flags.schedule.split(","), config.steps, strict=True)
        steps = [step for text, step in parts if text.count(":") < 2]
    elif flags.score_layers is None and given.score_layers is UNSET:
        steps = [config.steps[0]]
    else:
        steps = []
    return ",".join(str(layer) for step in steps for layer in step.score_layers)


def _pruned_by_default(flags: ClaaFlags, given: ProfileStep) -> bool:
    return flags.schedule is None and flags.prune_layer is None and given.prune_layer is UNSET
