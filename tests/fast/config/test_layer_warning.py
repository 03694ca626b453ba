"""When a server warns of layers that nobody chose, and that what it tells the operator to do works."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from claa_sglang import cli
from claa_sglang.config.flags import ClaaFlags, resolve
from claa_sglang.config.layer_warning import layer_warning
from claa_sglang.config.profile_file import load_profile

LAYERS = 30
RANK, DROP = "layers {} rank the prompt tokens", "tokens are dropped after layer {}"
BOTH = f"{RANK.format('11,12,13,14')} and {DROP.format(14)} (of 30 layers) by default"


def warned(model: str = "org/Small-1B", **flags: Any) -> str | None:
    given = ClaaFlags(**flags)
    profile = load_profile(given.profile, LAYERS) if given.profile else None
    return layer_warning(given, resolve(given, LAYERS), profile, model)


@pytest.fixture
def profile(tmp_path: Path) -> Any:
    def write(**step: Any) -> str:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({"version": 1, "model": {"num_layers": LAYERS}, "steps": [step] if step else []}))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, BOTH),
        ({"keep_rate": 0.5, "ranker": "fastkv", "window": 4, "policy": "always"}, BOTH),
        ({"prune_layer": 20}, f"{RANK.format('17,18,19,20')} (of 30 layers) by default"),
        ({"score_layers": "12,14"}, f"{DROP.format(14)} (of 30 layers) by default"),
        ({"schedule": "14:0.4,20:0.2:18+20"}, f"{RANK.format('11,12,13,14')} (of 30 layers) by default"),
    ],
)
def test_only_what_nobody_chose_is_named(flags: dict[str, Any], says: str) -> None:
    text = warned(**flags)
    assert text is not None and text.startswith(f"claa-sglang: {says}, not because they suit this model")
    assert "answers can suffer" in text


@pytest.mark.parametrize(
    "flags",
    [
        {"prune_layer": 14, "score_layers": "11,12,13,14"},  # the defaults, but chosen
        {"prune_layer": 20, "score_layers": "4"},
        {"schedule": "14:0.4:12+14,20:0.2:18+20"},
    ],
)
def test_explicit_layers_are_not_warned_of(flags: dict[str, Any]) -> None:
    assert warned(**flags) is None


def test_a_profile_speaks_for_what_it_gives(profile: Any) -> None:
    whole = {"prune_layer": 19, "keep_rate": 0.3, "score_layers": [17, 18]}
    assert warned(profile=profile(**whole)) is None
    assert warned(profile=profile(**whole), prune_layer=20) is None
    assert BOTH in str(warned(profile=profile(keep_rate=0.3)))
    assert BOTH in str(warned(profile=profile()))
    assert RANK.format("16,17,18,19") + " (of" in str(warned(profile=profile(prune_layer=19)))
    assert warned(profile=profile(prune_layer=19), score_layers="3") is None


@pytest.mark.parametrize("model", ["org/Small-1B", "/srv/my models/it's one", "../small/", "."])
def test_the_command_and_the_flag_can_be_pasted(model: str) -> None:
    lines = str(warned(model)).splitlines()
    command, flag = (shlex.split(line) for line in lines if line.startswith("    "))
    args = cli._parser().parse_args(command[1:])
    assert command[:2] == ["claa-sglang", "calibrate"] and args.model == model
    assert flag == ["--enable-claa", "--claa-profile", str(args.out)] and args.out.parent == Path(".")
