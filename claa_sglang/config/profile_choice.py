"""`--claa-profile auto`, `none` or a path: which profile a server uses, and the configuration that it makes.

Decided once, in the process that runs the server. A profile that nobody named never stops a start: where it cannot be
used, with these flags or at all, the start goes on without it and says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from claa_sglang.config import profile_search
from claa_sglang.config.config import ClaaConfig, ConfigError
from claa_sglang.config.flags import NONE, ClaaFlags, profile_path, resolve
from claa_sglang.config.layer_warning import layer_warning
from claa_sglang.config.profile_file import Profile, load_profile
from claa_sglang.config.profile_model import ProfileModel
from claa_sglang.config.profile_weights import Samples, stated
from claa_sglang.config.state_room import Room


class Choice(NamedTuple):
    """What came of it.

    config: with `profile` the path that was taken, and `profile_origin` how it was found.
    weights: what the profile's provenance knows of the weights, None where it knows nothing or there is no profile.
    warnings: for the operator, each once.
    """

    config: ClaaConfig
    weights: Samples | None
    warnings: tuple[str, ...]


class Model(NamedTuple):
    """The served model, as far as it is known before its weights are loaded.

    path: as the operator named it. made: architecture and name. room: what its KV rows can hold, None if unknown.
    max_window: tokens that a window may have, as a prefill chunk must hold it; None for any.
    """

    path: str
    made: ProfileModel
    room: Room | None = None
    max_window: int | None = None


def choose(flags: ClaaFlags, model: Model, environ: Mapping[str, str] = os.environ) -> Choice:
    """The configuration of a server of `model` with `flags`. Raises ConfigError where the flags cannot be used."""
    if flags.profile == NONE:
        return _made(flags, model, None, "none: the paper's layers")
    if (path := profile_path(flags)) is not None:
        profile = load_profile(path, model.made.num_layers, model.made)
        return _made(flags, model, profile, "--claa-profile")
    found, warnings = profile_search.candidates(model.made, environ)
    unusable = []
    for path, profile, origin in found:
        try:
            choice = _made(msgspec.structs.replace(flags, profile=path), model, profile, origin)
            _require_window(choice.config, model)
        except ConfigError as error:
            unusable.append(f"{path}: {error}")
            continue
        return choice._replace(warnings=(*warnings, *choice.warnings))
    origin = "auto: what fits the model cannot be used" if unusable else "auto: no profile fits this model"
    choice = _made(msgspec.structs.replace(flags, profile=None), model, None, origin)
    return choice._replace(warnings=(*warnings, *_in_one(unusable, choice.warnings)))


def _in_one(unusable: list[str], warnings: tuple[str, ...]) -> tuple[str, ...]:
    """One warning of profiles that cannot be used, and of what is used instead."""
    if not unusable:
        return warnings
    listed = "\n".join(f"    {line}" for line in unusable)
    dropped = f"claa-sglang: no profile is used, as this server cannot use what fits its model:\n{listed}"
    return ("\n".join((dropped, *warnings)),)


def _made(flags: ClaaFlags, model: Model, profile: Profile | None, origin: str) -> Choice:
    config = resolve(flags, model.made.num_layers, model.made, model.room)
    warning = None if flags.profile == NONE else layer_warning(flags, config, profile, model.path)
    return Choice(
        config=msgspec.structs.replace(config, profile_origin=origin),
        weights=None if profile is None else stated(profile.provenance),
        warnings=(warning,) if warning else (),
    )


def _require_window(config: ClaaConfig, model: Model) -> None:
    """A window that a chunk cannot hold is refused at start; one that nobody asked for must not get so far."""
    if model.max_window is not None and config.window > model.max_window:
        raise ConfigError(f"its window of {config.window} tokens is longer than a prefill chunk, {model.max_window}")
