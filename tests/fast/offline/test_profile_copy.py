"""The copy that a calibration leaves where servers look for profiles."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from claa_sglang import cli
from claa_sglang.config import profile_search
from claa_sglang.config.flags import ClaaFlags
from claa_sglang.config.profile_choice import Model, choose
from claa_sglang.config.profile_file import Profile, ProfileStep
from claa_sglang.config.profile_model import ProfileModel
from claa_sglang.config.profile_weights import KEY
from claa_sglang.offline.calibrate import pipeline, profile

MADE = Profile(
    version=1,
    model=ProfileModel(
        **{"num_layers": 8, "name": "Tiny Model/2", "architecture": "LlamaForCausalLM", "hidden_size": 64},
        **{"heads": 4, "kv_heads": 2, "vocabulary": 512},
    ),
    steps=(ProfileStep(prune_layer=3),),
    provenance={KEY: "q 0123456789abcdef"},
)


def test_a_server_of_the_model_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(profile_search.VARIABLE, str(tmp_path / "found"))
    copy = profile.keep(MADE)
    assert copy is not None and re.fullmatch(r"tiny-model-2-[0-9a-f]{8}\.json", copy.name)
    choice = choose(ClaaFlags(), Model("m", MADE.model))
    assert choice.config.profile == str(copy) and choice.config.steps[0].prune_layer == 3
    assert choice.weights == {"q": "0123456789abcdef"}


def test_the_same_weights_replace_it_and_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(profile_search.VARIABLE, str(tmp_path))
    copy = profile.keep(MADE)
    assert profile.keep(msgspec.structs.replace(MADE, steps=(ProfileStep(prune_layer=2),))) == copy
    assert copy is not None and msgspec.json.decode(copy.read_bytes())["steps"] == [{"prune_layer": 2}]
    other = msgspec.structs.replace(MADE, provenance={KEY: "q fedcba9876543210"})
    assert profile.keep(other) != copy and len(list(tmp_path.iterdir())) == 2


def test_the_command_says_where_it_is_and_does_not_fail_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "calibrate", lambda args: MADE)
    (tmp_path / "file").write_text("")
    for folder, copied in ((tmp_path / "found", True), (tmp_path / "file", False)):
        monkeypatch.setenv(profile_search.VARIABLE, str(folder))
        assert cli.main(["calibrate", "--model", "m", "--out", str(tmp_path / "p.json")]) == 0
        said = capsys.readouterr()
        assert (tmp_path / "p.json").is_file() and "--claa-profile" in said.out
        assert (f"a copy at {folder}/tiny-" in said.out) == copied
        assert ("no copy for servers of this user" in said.err) != copied
