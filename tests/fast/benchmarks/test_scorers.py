"""The arithmetic of benchmarks.scorers by hand; it measures on a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import scorers
from claa_sglang.ranking import selection


def test_bytes_and_layers() -> None:
    assert scorers.key_bytes(8192, 1) == 8192 * 2048 == 16 << 20
    assert scorers.key_bytes(131072, 8) == 2 << 30
    assert [scorers.layers_in_turn(n, b) for n, b in ((8192, 1), (8192, 8), (131072, 1), (131072, 8))] == [16, 2, 2, 2]
    assert scorers.layers_in_turn(100, 1) == scorers.MOST_LAYERS
    assert scorers.fits(131072, 8, 6 << 30) and not scorers.fits(131072, 8, (6 << 30) - 1)


def test_summary_and_kept() -> None:
    assert scorers.summary([3.0, 1.0, 2.004]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert [scorers.kept_of(n, 0.2) for n in (8192, 100, 20)] == [1638, 33, 20]


def test_overlap_leaves_out_the_window() -> None:
    left, right = torch.tensor([0, 1, 2, 3, 8, 9]), torch.tensor([0, 1, 4, 5, 8, 9])
    assert scorers.overlap(left, right, window=2) == 0.5
    assert scorers.overlap(left, left, window=2) == 1.0


def test_top_k_picks_what_the_sort_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch in FlashInfer's place, which gives a row's best in any order, the lower one of equals first."""

    def top_k(
        values: torch.Tensor, k: int, *, deterministic: bool, tie_break: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert deterministic and tie_break == 1
        order = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        return values.gather(1, order), order.flip(-1)

    fake: Any = ModuleType("flashinfer")
    fake.top_k, fake.TopKTieBreak = top_k, type("TopKTieBreak", (), {"SMALL": 1})
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    ranking = torch.rand(500).mul(20).round()
    ranking[7] = torch.nan
    for kept in (32, 33, 34, 200):
        expected = selection.select(ranking, 532, kept, 32)
        assert torch.equal(scorers.select_by_top_k(ranking, 532, kept, 32), expected)


def test_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    args = scorers.parse_args(["--out", str(tmp_path / "deep" / "s.json"), "--runs", "20"])
    assert args.tokens == [8192, 32768, 131072] and args.batch == [1, 8]
    times = {"median": 10.0, "min": 9.0, "max": 11.0}
    case = {"tokens": 8192, "batch": 1, "triton": times, "flashinfer": times, "plan, host": times, "K once": 5.0}
    case |= {"largest difference": 1e-7, "kept by both": 1.0}
    assert "1 x 8192: triton 10 us, flashinfer 10 us (plan 10 us on the host), K once 5 us" in scorers.line(case)
    picked: dict[str, Any] = {"tokens": 9, "stable sort": times, "top_k": {"error": "ImportError: none"}}
    assert scorers.pick_line(picked) == "9: top_k ImportError: none"
    picked |= {"top_k": times, "same tokens, distinct values": True, "same tokens, ties": False}
    assert "the same tokens: True, ties False" in scorers.pick_line(picked)
    scorers.write(args, 3000.4, [case], [picked])
    record = json.loads(args.out.read_text())
    assert record["device"] == "a card" and record["device copy, bytes per microsecond"] == 3000
    assert record["times, microseconds"] == [case] and record["versions"]["torch"]
