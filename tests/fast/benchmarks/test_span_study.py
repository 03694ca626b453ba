"""benchmarks.span_study: keep rates that whole answers take, held against plain loops over `select`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import span_study
from benchmarks.spans import tables
from benchmarks.spans.counting import ALL, Group, Outcome, outcomes, rows
from benchmarks.spans.minimal import minimal_kept
from claa_sglang.config.budget import kept_count
from claa_sglang.offline.basics import CaptureError
from claa_sglang.ranking.rankers import make
from claa_sglang.ranking.selection import select
from claa_sglang.ranking.spec import parse
from tests.fast import studies
from tests.fast.studies import TOKENS, WINDOW

NAMES = ("claa:paper", "claa:queries=sum", "claa:queries=sum,kernel=3", "fastkv", "uniform")
RATES = (0.05, 0.1, 0.2, 0.5, 1.0)
GROUP = Group("chat", 1024, "needle")


def keeps_all(ranking: Tensor, needed: Tensor, kept: int, window: int) -> bool:
    positions = select(ranking, needed.numel(), kept, window).tolist()
    return all(position in positions for position in needed.nonzero()[:, 0].tolist())


def by_trying(ranking: Tensor, needed: Tensor, window: int) -> int:
    kept = window
    while not keeps_all(ranking, needed, kept, window):
        kept += 1
    return kept


@pytest.mark.parametrize("name", NAMES)
def test_studies_need_what_trying_says(name: str) -> None:
    """Half of the made-up prompts have their needle in layer 5's attention, so that many keep rates occur."""
    rankers = {name: make(parse(name))}
    minimal = []
    for sample, study in studies.prompts({5: 0.5}, count=8):
        needed = sample.needles[0].tokens
        if name == "uniform":
            study.statistics["nothing"] = torch.empty(studies.LAYERS, 0, studies.RANKED)
        found = outcomes(GROUP, study, needed, rankers, [(5,), (4, 5)])
        for one in found:
            ranking = study.rank(rankers[name], one.layers)
            assert one.kept == by_trying(ranking, needed, WINDOW)
            for rate in RATES:
                assert one.whole(rate) == keeps_all(ranking, needed, kept_count(TOKENS, rate, WINDOW), WINDOW)
        minimal += [one.kept for one in found]
    assert len(set(minimal)) > 4


@pytest.mark.parametrize("window", [1, 3, 8])
def test_ties_nan_first_tokens_and_windows(window: int) -> None:
    rng = torch.Generator().manual_seed(window)
    for _ in range(100):
        ranking = torch.randint(0, 5, (20,), generator=rng).float()
        ranking[ranking == 4] = math.nan
        needed = torch.rand(20 + window, generator=rng) < 0.1
        needed[int(torch.randint(0, 20 + window, (), generator=rng))] = True
        assert minimal_kept(ranking, needed, window) == by_trying(ranking, needed, window)
    first, last = torch.zeros(20 + window, dtype=torch.bool), torch.zeros(20 + window, dtype=torch.bool)
    first[0], last[-1] = True, True
    assert minimal_kept(ranking, first, window) == window + 1, "the first token is kept before any other"
    assert minimal_kept(ranking, last, window) == window, "the window is kept anyway"


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="leave such prompts out"):
        minimal_kept(torch.zeros(4), torch.zeros(6, dtype=torch.bool), 2)
    with pytest.raises(ValueError, match=r"ranking \(5,\) of a prompt of 6 with a window of 2"):
        minimal_kept(torch.zeros(5), torch.ones(6, dtype=torch.bool), 2)


def test_rows_are_shares_and_quantiles(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        Outcome(Group("chat", 100, task), "claa", (3,), kept, 100, 10)
        for task, kept in (("one", 10), ("one", 20), ("two", 21), ("two", 60), ("two", 100))
    ]
    made = rows(found, [0.1, 0.2, 0.6])
    by_task = {row.task: row for row in made}
    assert list(by_task) == [ALL, "one", "two"]
    assert (by_task[ALL].n, by_task["one"].n, by_task["two"].n) == (5, 2, 3)
    assert by_task[ALL].whole == pytest.approx([0.2, 0.4, 0.8])
    assert by_task["two"].whole == pytest.approx([0, 0, 2 / 3])
    assert by_task[ALL].minimal == pytest.approx([0.21, 0.84, 1.0])
    tables.show(made, [0.1, 0.2, 0.6])
    shown = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    assert ["claa", "3", "5", "0.20", "0.40", "0.80", "0.21", "0.84", "1.00"] in cells
    assert ["two", "claa", "3", "0.60", "0.92", "1.00"] in cells


def test_layers_are_read_and_checked() -> None:
    assert span_study.layers_of("11,9,9") == (9, 11)
    assert span_study.checked(None, 24) == [(11,), (8, 9, 10, 11)]
    assert span_study.checked(None, 2) == [(0,)]
    assert span_study.checked([(13,), (9, 11)], 24) == [(13,), (9, 11)]
    with pytest.raises(CaptureError, match="--layers 3,24: the model has layers 0 to 23"):
        span_study.checked([(3, 24)], 24)


def test_an_unknown_ranker_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "spans.json"
    assert span_study.main(["--model", "nowhere", "--rankers", "best", "--out", str(out)]) == 1
    assert "ranker 'best': no such name" in capsys.readouterr().err and not out.exists()
