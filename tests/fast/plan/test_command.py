"""`claa-sglang plan`: what it prints, what it refuses in one line, and that it needs no torch before it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from claa_sglang import cli
from claa_sglang.plan.machine import Machine, load, shipped
from tests.conftest import ROOT
from tests.fast.plan.conftest import GPU


def asked(folder: Path, *more: str) -> list[str]:
    return ["plan", "--model", str(folder), "--prompt-tokens", "10240", "--machine", "h200", *more]


def test_every_prune_layer_with_every_keep_rate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(asked(folder, "--json", "--keep-rate", "0.1", "0.3", "--prune-layer", "9", "15")) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    found = [(row["prune_layer"], row["keep_rate"]) for row in record["rows"]]
    assert found == [(9, 0.1), (9, 0.3), (15, 0.1), (15, 0.3)]
    for row in record["rows"]:
        assert row["ttft_of_stock"] == pytest.approx(row["ttft"] / record["stock"]["ttft"])
        assert row["late_slots"] == int(row["keep_rate"] * 10240) + 256
        assert 0 < row["fit"] < record["stock"]["fit"]
    assert msgspec.convert(record["machine"], Machine) == load("h200")


def test_the_table_has_the_numbers_and_the_formula(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(asked(folder, "--keep-rate", "0.2", "--prune-layer", "15", "--json")) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert cli.main(asked(folder, "--keep-rate", "0.2", "--prune-layer", "15")) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.split()[:2] == ["15", "0.2"])
    assert f"{row['ttft_of_stock']:.3f}" in line and f"{row['late_slots']:,}" in line
    assert line.endswith(f" {row['pays_from']:,}")
    assert "matmul speed" in text and "off by" in text and "ttft_h200.json" in text


def test_a_record_is_made_read_and_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "machine.json"
    model = tmp_path / "tiny"
    model.mkdir()
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "head_dim": 32}
    (model / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | sizes))
    assert cli.main(["plan", "--measure", "--model", str(model), "--out", str(file)]) == 0
    made = load(str(file))
    assert made.head_dim == 32 and made.matmul > 1e6 and 1e6 < made.bandwidth < 1e14
    assert capsys.readouterr().out == ""
    assert cli.main(["plan", "--model", str(folder), "--prompt-tokens", "500", "--machine", str(file)]) == 0
    text = capsys.readouterr().out
    assert made.device in text and "was not held against measured times" in text and "heads of 32" in text


def test_a_file_has_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(GPU.to_json())
    assert load(str(tmp_path / "m.json")) == GPU


def test_shipped_records_are_read() -> None:
    assert shipped() == ("h100", "h200")
    assert all(load(name).checked for name in shipped())


BAD: dict[str, tuple[list[str], str]] = {
    "no tokens": (["--prompt-tokens", "0"], "--prompt-tokens 0: give 1 or more"),
    "fewer tokens": (["--prompt-tokens", "-5"], "--prompt-tokens -5: give 1 or more"),
    "longer than the model": (["--prompt-tokens", "200000"], "Give fewer"),
    "no question": (["--question-tokens", "0"], "--question-tokens 0: give 1 or more"),
    "no such machine": (["--machine", "nowhere.json"], "no such file. Give h100 or h200, or make a record"),
    "no record": (["--machine", "MODEL/config.json"], "Give h100 or h200, or make a record"),
    "a folder": (["--machine", "MODEL"], "Give h100 or h200, or make a record"),
    "no such model": (["--model", "nowhere"], "Give a model's directory, or its config.json"),
    "no config": (["--model", "MODEL/.."], "Give a model's directory, or its config.json"),
    "no JSON": (["--model", "MODEL/../text"], "Give a model's config.json"),
    "no object": (["--model", "MODEL/../list"], "Give a model's config.json"),
    "keep nothing": (["--keep-rate", "0"], "--keep-rate 0: give a share above 0"),
    "keep more": (["--keep-rate", "0.2", "2"], "--keep-rate 2: give a share above 0"),
    "not a number": (["--keep-rate", "nan"], "--keep-rate nan: give a share above 0"),
    "no such layer": (["--prune-layer", "31"], "--prune-layer 31: give 0 to 27"),
    "no window": (["--window", "0"], "--window 0: give 1 to 1024"),
    "steps below the window": (["--chunked-prefill-size", "16"], "a step must hold the window"),
    "no memory": (["--mem-fraction-static", "0"], "give a share above 0"),
    "no slots": (["--max-total-tokens", "0"], "--max-total-tokens 0: give 1 or more"),
    "two machines": (["--measure"], "--measure and --machine: give one of them"),
    "no measurement": (["--out", "m.json"], "--out without --measure"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_a_remedy(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "text").write_bytes(b"\xff\xfe no JSON")
    (folder.parent / "list").write_text("[]")
    words, says = BAD[case]
    assert cli.main(asked(folder, *(word.replace("MODEL", str(folder)) for word in words))) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("claa-sglang plan: ") and says in said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--machine is missing"),
        (["--machine", "h200"], "--prompt-tokens is missing"),
        (["--machine", "h200", "--prompt-tokens", "100"], "--model is missing"),
    ],
)
def test_what_is_missing_is_named(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *words]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"claa-sglang plan: {says}") and said.err.count("\n") == 1


def test_a_plan_needs_neither_torch_nor_sglang(folder: Path) -> None:
    code = (
        "import sys; from claa_sglang import cli; status = cli.main(sys.argv[1:]); "
        "sys.exit(status or ', '.join({'torch', 'sglang', 'transformers'} & set(sys.modules)) or None)"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, *asked(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (made.returncode, made.stderr) == (0, "")
