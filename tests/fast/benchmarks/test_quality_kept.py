"""Kept sets, cold and with a prefix hit."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import eval_quality
from tests.fast.quality_server import Server, result


def test_kept_sets_cold_and_after_a_hit(server: Server, command: list[str], tmp_path: Path) -> None:
    assert eval_quality.main([*command, "--keep-rates", "0.25", "0.5", "--kept-sets", "3"]) == 0
    found = {(one["keep_rate"], one["hit"]): one for one in result(tmp_path)["kept_sets"]}
    assert list(found) == [(0.25, "half"), (0.25, "all"), (0.5, "half"), (0.5, "all")]
    for (rate, hit), one in found.items():
        assert one["prompts"] == 3 and one["kept"] == int(rate * 100) and one["length"] == 1024
        assert one["cached"] == {"half": 50, "all": 99}[hit]
        assert one["differing"] == [int(hit == "half")] * 3 and one["median"] == one["most"] == int(hit == "half")
        assert one["same_text"] == one["same_grade"] == 3
    server.flush = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cached after a flush: something else runs"):
        eval_quality.main([*command, "--keep-rates", "0.5", "--kept-sets", "3"])
