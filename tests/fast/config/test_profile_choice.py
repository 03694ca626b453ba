"""Which profile a server uses: found, named or none; and that one nobody named never stops a start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from claa_sglang.config.config import ConfigError
from claa_sglang.config.flags import ClaaFlags
from claa_sglang.config.profile_choice import Choice, Model, choose
from claa_sglang.config.profile_model import ProfileModel
from claa_sglang.config.profile_search import SHIPPED, user_folder
from claa_sglang.config.state_room import Room

SMOLLM2 = SHIPPED / "smollm2-135m-instruct.json"
# As a server describes it: what the shipped profile states, and the name of its directory.
SERVED = ProfileModel(
    num_layers=30, architecture="LlamaForCausalLM", hidden_size=576, heads=9, kv_heads=3, vocabulary=49152, name="small"
)
OTHER = msgspec.structs.replace(SERVED, vocabulary=49153)
STEP = {"prune_layer": 20, "keep_rate": 0.25, "score_layers": [18, 20]}
DATE = "2026-01-02"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The user's folder; not there until something is written."""
    return tmp_path / "profiles"


@pytest.fixture
def write(folder: Path) -> Callable[..., str]:
    def write(name: str, model: ProfileModel = SERVED, step: dict = STEP, date: str = DATE, **more: Any) -> str:
        folder.mkdir(exist_ok=True)
        stated = msgspec.to_builtins(model)
        content = {"version": 1, "model": stated, "steps": [step], "provenance": {"date": date}, **more}
        (folder / name).write_text(json.dumps(content))
        return str(folder / name)

    return write


@pytest.fixture
def choice(folder: Path) -> Callable[..., Choice]:
    """What a server of SERVED, or of `made`, chooses with these flags."""

    def choice(made: ProfileModel = SERVED, room: Room | None = None, chunk: int | None = None, **flags: Any) -> Choice:
        return choose(ClaaFlags(**flags), Model("org/small", made, room, chunk), {"CLAA_PROFILES": str(folder)})

    return choice


# --- what is found


@pytest.mark.parametrize("given", [{}, {"profile": "auto"}], ids=["nothing", "auto"])
def test_a_shipped_profile_is_found(choice: Callable[..., Choice], given: dict) -> None:
    found = choice(**given)
    assert found.config.profile == str(SMOLLM2) and found.config.profile_origin == "auto: shipped with claa-sglang"
    assert found.config.steps[0].prune_layer == json.loads(SMOLLM2.read_text())["steps"][0]["prune_layer"]
    assert found.weights and not found.warnings


def test_the_users_wins_over_a_shipped_one(choice: Callable[..., Choice], write: Callable[..., str]) -> None:
    path = write("mine.json", date="1999-01-01")
    config = choice().config
    assert config.profile == path and config.profile_origin == "auto: calibrated for this user"
    assert (config.steps[0].prune_layer, config.steps[0].keep_rate) == (20, 0.25)


def test_of_several_the_same_name_counts_then_the_date_then_the_file(
    choice: Callable[..., Choice], write: Callable[..., str], folder: Path
) -> None:
    other = msgspec.structs.replace(SERVED, name="another")
    order = [
        write("z.json", date="2026-01-01"),
        write("y.json", date="2025-12-31"),
        write("a.json", other, date="2026-05-01"),
        write("b.json", other, date="2026-05-01"),
        write("c.json", other, date=""),
    ]
    for count, path in zip(range(5, 0, -1), order, strict=True):
        config = choice().config
        among = f", the best of {count} that fit" if count > 1 else ""
        assert config.profile == path and config.profile_origin == f"auto: calibrated for this user{among}"
        os.unlink(path)
    assert choice().config.profile == str(SMOLLM2)


@pytest.mark.parametrize("field", ["architecture", "hidden_size", "heads", "kv_heads", "vocabulary", "num_layers"])
def test_only_one_that_states_the_whole_architecture_and_is_of_it_is_found(
    choice: Callable[..., Choice], write: Callable[..., str], field: str, folder: Path
) -> None:
    stated = msgspec.to_builtins(SERVED)
    other = "Qwen2ForCausalLM" if field == "architecture" else stated[field] + 1
    write("other.json", msgspec.structs.replace(SERVED, **{field: other}))
    assert choice().config.profile == str(SMOLLM2)
    if field != "num_layers":  # which every profile states
        folder.joinpath("part.json").write_text(
            json.dumps({"version": 1, "model": {k: v for k, v in stated.items() if k != field}, "steps": [STEP]})
        )
        assert choice().config.profile == str(SMOLLM2)
    write("whole.json")
    assert choice().config.profile == str(folder / "whole.json")


def test_damaged_files_are_passed_over_with_a_warning_each(
    choice: Callable[..., Choice], write: Callable[..., str], folder: Path
) -> None:
    path = write("good.json")
    (folder / "cut.json").write_text(Path(path).read_text()[:-9])
    (folder / "binary.json").write_bytes(b"\xff\0")
    (folder / "empty.json").write_bytes(b"")
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "notes.txt").write_text("not looked at")
    found = choice()
    assert found.config.profile == path
    bad = ("binary.json", "cut.json", "empty.json", "folder.json", "pipe.json")
    for name, warning in zip(bad, found.warnings, strict=True):
        assert warning.startswith(f"claa-sglang: {folder / name} is passed over: ") and "Remove it" in warning


def test_a_folder_that_cannot_be_read_is_a_warning(choice: Callable[..., Choice], folder: Path) -> None:
    folder.write_text("a file")
    found = choice()
    assert found.config.profile == str(SMOLLM2)
    assert len(found.warnings) == 1 and f"profiles in {folder} are passed over" in found.warnings[0]


# --- none


def test_a_model_without_a_profile_is_warned_of_once(choice: Callable[..., Choice]) -> None:
    found = choice(made=OTHER)
    assert found.config.profile is None and found.config.profile_origin == "auto: no profile fits this model"
    assert found.config.steps[0].prune_layer == 14 and found.weights is None
    (warning,) = found.warnings
    for word in ("layers 11,12,13,14 rank", "answers can suffer", "claa-sglang calibrate --model org/small --out"):
        assert word in warning


def test_none_is_the_papers_rule_without_a_warning(choice: Callable[..., Choice], write: Callable[..., str]) -> None:
    write("mine.json")
    found = choice(profile="none")
    assert found == choice(made=OTHER, profile="none")
    assert found.config.profile is None and found.config.profile_origin == "none: the paper's layers"
    assert found.config.steps[0].score_layers == (11, 12, 13, 14) and not found.warnings


# --- named


def test_a_named_one_is_taken_or_refused(
    choice: Callable[..., Choice], write: Callable[..., str], tmp_path: Path
) -> None:
    path = write("mine.json")
    found = choice(profile=path)
    assert (found.config.profile, found.config.profile_origin) == (path, "--claa-profile")
    assert found.weights is None and not found.warnings
    with pytest.raises(ConfigError, match="49,152 tokens of vocabulary, this model has 49,153"):
        choice(made=OTHER, profile=path)
    with pytest.raises(ConfigError, match="cannot be read"):
        choice(profile=str(tmp_path / "no.json"))
    (tmp_path / "auto").write_text("{")
    with pytest.raises(ConfigError, match="not a profile"):
        choice(profile=str(tmp_path / "auto"))


# --- flags beside one that was found


def test_explicit_flags_win_over_what_was_found(choice: Callable[..., Choice], write: Callable[..., str]) -> None:
    path = write("mine.json", window=16)
    config = choice(keep_rate=0.5, window=4).config
    assert config.profile == path and config.steps[0].keep_rate == 0.5 and config.window == 4
    assert config.steps[0].prune_layer == 20
    config = choice(schedule="14:0.4,20:0.2").config
    assert config.profile == path and len(config.steps) == 2 and config.window == 16


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"prune_layer": 10}, "--claa-score-layers 18,20: must be layers 0 to 10"),
        ({"chunk": 12}, "its window of 16 tokens is longer than a prefill chunk, 12"),
        ({"room": Room(num_layers=30, hidden_size=576, layer_width=96, element_bytes=2)}, "prune layer 20"),
    ],
    ids=["prune layer", "chunk", "room"],
)
def test_one_that_cannot_be_used_is_dropped_with_one_warning(
    choice: Callable[..., Choice], write: Callable[..., str], flags: dict, says: str
) -> None:
    """Whatever starts with `none` starts with auto, and then runs as with `none`."""
    flags = {"made": OTHER, **flags}  # no shipped profile fits
    path = write("mine.json", OTHER, window=16)
    found, without = choice(**flags), choice(**flags, profile="none")
    assert msgspec.structs.replace(found.config, profile_origin="") == msgspec.structs.replace(
        without.config, profile_origin=""
    )
    assert found.config.profile_origin == "auto: what fits the model cannot be used" and found.weights is None
    (warning,) = found.warnings
    assert "no profile is used" in warning and f"{path}: " in warning and says in warning
    assert "answers can suffer" in warning


def test_the_next_one_is_taken_where_the_first_cannot_be_used(
    choice: Callable[..., Choice], write: Callable[..., str]
) -> None:
    write("a.json", step={**STEP, "prune_layer": 29}, date="2026-02-02")
    path = write("b.json")
    assert choice().config.profile == path


def test_flags_that_are_wrong_by_themselves_are_refused_as_without_a_profile(
    choice: Callable[..., Choice], write: Callable[..., str]
) -> None:
    path = write("mine.json")
    with pytest.raises(ConfigError, match="^--claa-pool-kernel 8: must be odd") as caught:
        choice(pool_kernel=8)
    assert path not in str(caught.value)


# --- where the user's folder is


@pytest.mark.parametrize(
    ("environ", "where"),
    [
        ({"CLAA_PROFILES": "/srv/profiles", "XDG_CACHE_HOME": "/x"}, "/srv/profiles"),
        ({"CLAA_PROFILES": "", "XDG_CACHE_HOME": "/x"}, "/x/claa-sglang/profiles"),
        ({"XDG_CACHE_HOME": "relative"}, "{home}/.cache/claa-sglang/profiles"),
        ({}, "{home}/.cache/claa-sglang/profiles"),
        ({"CLAA_PROFILES": "~/p"}, "{home}/p"),
    ],
)
def test_the_users_folder(environ: dict[str, str], where: str) -> None:
    assert user_folder(environ) == Path(where.format(home=Path.home()))


def test_every_shipped_profile_states_its_model_and_its_weights() -> None:
    for file in SHIPPED.glob("*.json"):
        served = msgspec.json.decode(file.read_bytes())["model"]
        model = msgspec.convert(served, ProfileModel)
        found = choose(ClaaFlags(), Model("m", model), {"CLAA_PROFILES": str(SHIPPED.parent / "none")})
        assert found.config.profile is not None and found.weights and not found.warnings, file
