"""Flags in a configuration file: they say what a command line says, and what YAML reads as another is refused."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

from claa_sglang.patches.arguments import add_flags, read_config, take_flags


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("claa-score-layers: [14]", "14,"),
        ("claa-score-layers: [14, 17]", "14,17,"),
        ("claa-score-layers:\n  - 14\n  - 17", "14,17,"),
        ("claa-score-layers: 14", "14"),
        ("claa-score-layers: 14,", "14,"),
        ("claa-score-layers: 14,17", "14,17"),
        ("claa-schedule: '14:0.4'", "14:0.4"),
        ("claa-schedule: 14:0.4,20:0.15", "14:0.4,20:0.15"),
        ("claa-schedule: ['14:0.4', '20:0.15:18+20']", "14:0.4,20:0.15:18+20"),
        ("claa-keep-rate: 0.3", 0.3),
        ("claa-keep-rate: [0.3]", 0.3),
        ("claa-keep-rate: 3e-1", 0.3),
        ("claa-prune-layer: 14", 14),
        ("claa-window: '4'", 4),
        ("claa-pool-kernel: 5", 5),
        ("claa-ranker: uniform", "uniform"),
        ("claa-min-prompt-tokens: 0", 0),
        ("claa-policy: always", "always"),
        ("claa-profile: p.json", "p.json"),
        ("claa-allow-explain: true", True),
        ("claa-allow-explain: false", None),
    ],
)
def test_a_configuration_file_says_what_a_command_line_says(tmp_path: Path, line: str, found: Any) -> None:
    assert getattr(from_yaml(tmp_path, line), line.partition(":")[0].replace("-", "_")) == found


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "claa-schedule: 14:0.4",
            'claa-schedule: 840.4: arrived as a number.*write it in quotes, claa-schedule: "14:0.4"',
        ),
        ("claa-schedule: 14:1", 'claa-schedule: 841: arrived as a number.*claa-schedule: "14:1"'),
        ("claa-schedule: 0.4", 'claa-schedule: 0.4: arrived as a number.*in quotes, claa-schedule: "0:0.4"'),
        ("claa-schedule: 14", 'claa-schedule: 14: arrived as a number.*claa-schedule: "14:0.4"'),
        ("claa-schedule: [14:0.4, 20:0.15]", 'claa-schedule .*840.4.*"14:0.4"'),
        ("claa-score-layers: []", "claa-score-layers .*empty list"),
        ("claa-score-layers:", "claa-score-layers: has no value. Leave the line out"),
        ("claa-score-layers: {a: 1}", "claa-score-layers: arrived as {'a': 1}"),
        ("claa-window: [4, 8]", r"claa-window: arrived as the list \[4, 8\]. Give one value"),
        ("claa-keep-rate: []", r"claa-keep-rate: arrived as the list \[\]"),
        ("claa-ranker: off", "claa-ranker: arrived as False"),
        ("claa-profile: null", "claa-profile: has no value"),
        ("claa-allow-explain: 1", "claa-allow-explain: arrived as 1. Give true or false"),
        ("claa-allow-explain: 'yes'", "claa-allow-explain: arrived as 'yes'"),
        ("claa-allow-explain:", "claa-allow-explain: has no value"),
        ("claa-window: 8.5", "invalid int value: '8.5'"),
    ],
)
def test_a_value_that_yaml_read_as_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, line: str, says: str
) -> None:
    with pytest.raises(SystemExit):
        from_yaml(tmp_path, line)
    assert re.search(says, capsys.readouterr().err)


def from_yaml(directory: Path, line: str) -> Any:
    """The record of a configuration file with `line`: SGLang's merger and parser, with our hooks in between."""
    parser = argparse.ArgumentParser()
    add_cli_args_from_dataclass(parser, ServerArgs)
    add_flags(None, parser)
    (file := directory / "config.yaml").write_text(f"model-path: x\nenable-claa: true\n{line}\n")
    merger = ConfigArgumentMerger(parser)
    merger._parse_yaml_config = lambda path: read_config(
        ConfigArgumentMerger._parse_yaml_config(merger, path), merger, path
    )
    given = parser.parse_args(merger.merge_config_with_args(["--config", str(file)]))
    return take_flags(ServerArgs.from_cli_args(given), given)
