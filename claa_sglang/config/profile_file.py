"""A profile: the values of a configuration for one model, in a JSON file, with where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from claa_sglang.config.config import ConfigError, KeepRate, Layer, Layers, PoolKernel, PromptTokens, Window, short
from claa_sglang.config.profile_model import ProfileModel, difference

MAX_PROFILE_BYTES = 1 << 20  # a profile has about a thousand; more is another kind of file


class ProfileStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One prune step of a profile; in the first step a value left out is the default."""

    prune_layer: Layer | UnsetType = UNSET
    keep_rate: KeepRate | UnsetType = UNSET
    score_layers: Layers | UnsetType = UNSET


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A profile file: values for one model, as a calibration writes them, and where they come from."""

    version: Literal[1]
    model: ProfileModel
    steps: tuple[ProfileStep, ...] = ()
    window: Window | UnsetType = UNSET
    pool_kernel: PoolKernel | UnsetType = UNSET
    ranker: str | UnsetType = UNSET
    min_prompt_tokens: PromptTokens | UnsetType = UNSET
    provenance: dict[str, str] = {}


class UnreadableProfile(ConfigError):
    """A file that is no profile. reason, remedy: the parts of its text, for those who did not ask for this file."""

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        super().__init__(f"--claa-profile {path}: {reason}. {remedy}")
        self.reason = reason


def read_profile(path: str) -> Profile:
    """Read a profile file, for whichever model. Raises UnreadableProfile naming the file and remedy."""
    try:
        text = _read_file(path)
    except (OSError, ValueError, TypeError) as error:
        remedy = "Give the path of a readable profile file"
        raise UnreadableProfile(path, f"cannot be read: {short(error)}", remedy) from error
    try:
        return msgspec.json.decode(text, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        remedy = "Write it again (a calibration does), or give the values as flags without --claa-profile"
        raise UnreadableProfile(path, f"not a profile: {short(error)}", remedy) from error


def load_profile(path: str, num_layers: int, served: ProfileModel | None = None) -> Profile:
    """Read and validate a profile file for a model (see `resolve`). Raises ConfigError naming the file and remedy."""
    profile = read_profile(path)
    if profile.model.num_layers != num_layers:
        raise ConfigError(
            f"--claa-profile {path}: made for a model of {profile.model.num_layers} layers"
            f"{f' ({short(profile.model.name)})' if profile.model.name else ''}, this model has {num_layers}. "
            "Use the profile of this model, or none."
        )
    if served is not None and (differs := difference(profile.model, served)):
        name = f" ({short(profile.model.name)})" if profile.model.name else ""
        raise ConfigError(
            f"--claa-profile {path}: made for another model{name}: {short(differs)}. "
            "Use the profile of this model, or none. `claa-sglang calibrate` makes one."
        )
    return profile


def _read_file(path: str) -> bytes:
    """The bytes of a file of at most MAX_PROFILE_BYTES. Raises OSError, ValueError or TypeError, and never waits."""
    str(path).encode()  # /server_info shows it as JSON, which has no surrogates
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError("it is not a file")  # opening a pipe would wait for its writer
    with open(path, "rb") as file:
        content = file.read(MAX_PROFILE_BYTES + 1)
    if len(content) > MAX_PROFILE_BYTES:
        raise ValueError(f"it is larger than {MAX_PROFILE_BYTES:,} bytes, which no profile is")
    return content
