"""The TTFT benchmark's command, its budget and its files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import bench_ttft
from benchmarks.ttft import report, run, scenarios
from benchmarks.ttft.record import load, save
from benchmarks.ttft.settings import CPU_DEFAULTS, GPU_DEFAULTS, HELP, Settings
from benchmarks.ttft.variants import STOCK, TTFT
from tests.fast.ttft_records import fill, full_record, model, record


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    made = record(engines=[{"name": "stock", "seconds": 1.5}], claa={"startup_seconds": {"server": 0.25}})
    fill(made, "cold", 1024, TTFT, stock=[0.1 + 0.2, 1e-9])
    save(made, tmp_path / "new" / "r.json")
    assert load(tmp_path / "new" / "r.json") == made
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1}', "[1]"], ids=repr)
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="other.json: not a result"):
        load(path)


def test_an_older_format_is_refused(tmp_path: Path) -> None:
    save(record(version=0), tmp_path / "old.json")
    with pytest.raises(ValueError, match="format 0"):
        load(tmp_path / "old.json")


def test_every_setting_is_an_option() -> None:
    assert set(HELP) == set(Settings.__struct_fields__)
    args = bench_ttft.parse_args(
        ["--lengths", "10", "20", "--chat", "1", "9", "3", "--mixed-gap", "0.5", "--rounds", "7"]
    )
    settings = bench_ttft.settings_of(args, gpu=False)
    assert (settings.lengths, settings.mixed_gap, settings.rounds) == ([10, 20], 0.5, 7)
    assert (settings.chat.first, settings.chat.last, settings.chat.turns) == (1, 9, 3)
    assert settings.chunks == CPU_DEFAULTS.chunks
    assert bench_ttft.settings_of(args, gpu=True).chunks == GPU_DEFAULTS.chunks


def test_a_budget_ends_before_it_is_exceeded() -> None:
    run.Budget(None).check(1e9)
    budget = run.Budget(100.0)
    budget.check(80.0)
    with pytest.raises(run.OutOfTime, match="100 s were used and the next round would take 90 s"):
        budget.check(90.0)


def test_what_fails_is_on_record_and_the_rest_goes_on(tmp_path: Path) -> None:
    made = record(stopped="")
    how = run.How(gpu=False, one_at_a_time=False, start_in_turn=False, log_level="error")
    running = run.Run(model(), CPU_DEFAULTS, how, run.Budget(None), made, tmp_path / "r.json")

    def once(index: int) -> scenarios.Samples:
        if index == 3:
            raise RuntimeError("this request was to run pruned: [x]")
        return {(TTFT, STOCK): float(index)}

    running.rounds("cold", 1024, 2048, once)
    running.rounds("cold", 2048, 2048, lambda index: {(TTFT, STOCK): 1.0})
    saved = load(tmp_path / "r.json")
    # Round 0 warms up.
    assert [(series.tokens, series.samples) for series in saved.series] == [(1024, [1.0, 2.0]), (2048, [1.0] * 5)]
    assert saved.errors == ["cold, 1024 tokens, chunk 2048, round 3: this request was to run pruned: [x]"]
    out = io.StringIO()
    report.print_record(saved, Console(file=out, width=160))
    assert "failed: cold, 1024" in out.getvalue() and "[x]" in out.getvalue()


def test_earlier_results_are_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(full_record(), tmp_path / "a.json")
    assert bench_ttft.main(["--plot", str(tmp_path / "a.json")]) == 0
    assert "keep 0.2" in capsys.readouterr().out
    assert (tmp_path / "a.png").exists()
