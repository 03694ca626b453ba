"""Where profiles lie, and which of them fit a model: the user's folder first, then what is shipped.

Host-side only: no torch, no SGLang.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from claa_sglang.config.config import short
from claa_sglang.config.profile_file import Profile, UnreadableProfile, read_profile
from claa_sglang.config.profile_model import ProfileModel, difference, is_whole

SHIPPED = Path(__file__).resolve().parents[1] / "profiles"
VARIABLE = "CLAA_PROFILES"


class Candidate(NamedTuple):
    """A profile that fits. origin: where it was found, and why before others, for people."""

    path: str
    profile: Profile
    origin: str


def user_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder where calibrations leave a copy: $CLAA_PROFILES, or claa-sglang/profiles in the user's cache.

    It need not exist. None where the user has no home directory.
    """
    if given := environ.get(VARIABLE):
        return Path(given).expanduser().absolute()
    cache = environ.get("XDG_CACHE_HOME", "")
    try:
        # An XDG directory that is not absolute is to be ignored, says the specification.
        base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "claa-sglang" / "profiles"


def candidates(served: ProfileModel, environ: Mapping[str, str] = os.environ) -> tuple[list[Candidate], list[str]]:
    """The profiles made for exactly the architecture of `served`, best first, and a warning for each damaged file.

    The user's come before shipped ones. Among several of a folder, one made for a model of the same name comes first,
    then the newest by the date in its provenance, then the first by file name. Never raises.
    """
    found: list[Candidate] = []
    warnings: list[str] = []
    for folder, what in ((user_folder(environ), "calibrated for this user"), (SHIPPED, "shipped with claa-sglang")):
        fitting = _fitting(folder, served, warnings) if folder is not None else []
        among = f", the best of {len(fitting)} that fit" if len(fitting) > 1 else ""
        found += [Candidate(path, profile, f"auto: {what}{among}") for path, profile in fitting]
    return found, warnings


def _fitting(folder: Path, served: ProfileModel, warnings: list[str]) -> list[tuple[str, Profile]]:
    """Path and profile of those in `folder` that fit, best first; damaged files are added to `warnings`."""
    fitting = []
    for path in _files(folder, warnings):
        try:
            profile = read_profile(path)
        except UnreadableProfile as error:
            warnings.append(
                f"claa-sglang: {short(path)} is passed over: {error.reason}. Remove it, or write it again with "
                "claa-sglang calibrate"
            )
            continue
        made_for = profile.model
        if is_whole(made_for) and made_for.num_layers == served.num_layers and not difference(made_for, served):
            fitting.append((path, profile))
    # Each sort keeps the order of the one before it among equals: the last one counts most.
    fitting.sort(key=lambda one: one[1].provenance.get("date", ""), reverse=True)
    fitting.sort(key=lambda one: one[1].model.name != served.name)
    return fitting


def _files(folder: Path, warnings: list[str]) -> list[str]:
    """The JSON files of `folder` by name; none where it does not exist."""
    try:
        return sorted(str(file) for file in folder.iterdir() if file.suffix == ".json")
    except FileNotFoundError:
        return []
    except OSError as error:
        warnings.append(
            f"claa-sglang: profiles in {short(folder)} are passed over: {short(error)}. Make it a folder that can be "
            f"read, or set {VARIABLE} to another"
        )
        return []
