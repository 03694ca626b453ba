"""The README's figure, and the times its text names, are those of the committed record."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.ttft import figure
from benchmarks.ttft.record import Record

ROOT = Path(__file__).resolve().parents[3]
RECORD = msgspec.json.decode((ROOT / "benchmarks/results/ttft_h200.json").read_bytes(), type=Record)


def test_a_pair_for_each_length() -> None:
    assert [stock.tokens for stock, _ in figure.pairs(RECORD)] == [10240, 32768, 131072]


def test_the_readme_names_the_times_of_the_record() -> None:
    stock, pruned = figure.pairs(RECORD)[1]
    text = (ROOT / "README.md").read_text()
    assert f"{1000 * pruned.value.median:,.0f} ms" in text and f"{1000 * stock.value.median:,.0f} ms" in text


def test_the_figure_is_written(tmp_path: Path) -> None:
    figure.draw(RECORD, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert text.count("of stock") == 3
