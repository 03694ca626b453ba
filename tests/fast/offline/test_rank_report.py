"""Measures by hand, the report on studies made up for it, and one small run of the command, stopped and resumed."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console

from claa_sglang.cli import main
from claa_sglang.offline import models, rank_plot, rank_report, rank_table
from claa_sglang.offline.basics import CaptureError
from claa_sglang.offline.measures import measure
from claa_sglang.offline.rank_report import Studied
from claa_sglang.offline.records import Subject
from claa_sglang.offline.study import PromptStudy
from claa_sglang.ranking import rankers
from claa_sglang.ranking.spec import RankerError
from claa_sglang.tasks.rankings import load as load_rankings
from claa_sglang.tasks.record import load as load_prompts
from tests import tiny_models

LAYERS, WINDOW, RANKED = 8, 4, 40


def _study(oracle: torch.Tensor, mass: torch.Tensor | None = None) -> PromptStudy:
    """A study of so many tokens, whose layers say `mass` [L, kv_heads, N-W]."""
    ranked = oracle.numel() - WINDOW
    mass = torch.rand(LAYERS, 2, ranked) if mass is None else mass
    statistics = {
        "window_peak": mass / 16,
        "window_mass": mass,
        "last_mass": mass.flip(0),
        "last_logits": mass.sum(1, keepdim=True),
        "nothing": torch.empty(LAYERS, 0, ranked),
    }
    options = {"window": WINDOW, "max_answer_tokens": 1}
    about = Subject(kind="study", model="m", fingerprint="f", prompt="p", tokens=oracle.numel(), options=options)
    return PromptStudy(about, statistics, oracle, (1,))


def _studies(count: int = 4) -> list[Studied]:
    """Layer 5 shows the oracle's peak sharply; the others are noise."""
    torch.manual_seed(0)
    made = []
    for index in range(count):
        oracle = torch.rand(RANKED + WINDOW)
        oracle[10 + index : 14 + index] += 5
        mass = torch.rand(LAYERS, 2, RANKED)
        mass[5] += 3 * oracle[:RANKED]
        made.append(Studied(_study(oracle, mass), "prose" if index % 2 else "repeated"))
    return made


def test_measures_by_hand() -> None:
    # Window of 4 with 0.1 each; budget 0.6 of 12 is 7: the first token and two more before the window.
    oracle = torch.tensor([0.5, 0.1, 0.2, 0.4, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1])
    ranking = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    got = measure(_study(oracle), torch.stack((ranking, ranking.flip(0))), 0.6)
    assert got.recall == pytest.approx([2 / 3, 1 / 3])  # ours {0, 1, 2} and {0, 6, 7}, the oracle's {0, 2, 3}
    assert got.mass == pytest.approx([(0.5 + 0.1 + 0.2 + 0.4) / 1.6, (0.5 + 0.4) / 1.6])
    # Ranks of the oracle, ties averaged: 8 5 6 7 2.5 2.5 2.5 2.5.
    oracle_ranks, ranks = [8, 5, 6, 7, 2.5, 2.5, 2.5, 2.5], [8, 7, 6, 5, 4, 3, 2, 1]
    products = sum((a - 4.5) * (b - 4.5) for a, b in zip(oracle_ranks, ranks, strict=True))
    norms = sum((a - 4.5) ** 2 for a in oracle_ranks) * sum((b - 4.5) ** 2 for b in ranks)
    assert got.rho[0] == pytest.approx(products / math.sqrt(norms))


def test_what_the_answer_repeats_is_counted_where_it_is_known() -> None:
    oracle = torch.rand(12)
    ranking = torch.arange(8.0, 0, -1)
    needed = torch.zeros(12, dtype=torch.bool)
    needed[[0, 5, 9]] = True  # 0 is ranked first, 5 is lost, 9 is in the window
    assert measure(_study(oracle), ranking[None], 0.5, needed).answer == pytest.approx([2 / 3])
    for unknown in (None, torch.zeros(12, dtype=torch.bool)):
        assert math.isnan(measure(_study(oracle), ranking[None], 0.5, unknown).answer[0])


def test_the_oracle_itself_is_the_best_there_is() -> None:
    oracle = torch.rand(RANKED + WINDOW)
    study = _study(oracle)
    own = oracle[:RANKED]
    got = measure(study, torch.stack((own, -own, *torch.rand(20, RANKED))), 0.3)
    # Of 9 tokens before the window, the first is kept whatever ranks.
    assert got.rho[:2] == pytest.approx([1, -1]) and got.recall[:2] == pytest.approx([1, 1 / 9])
    assert (got.mass[1:] < got.mass[0]).all()


def test_nan_in_a_ranking_is_the_last_choice() -> None:
    oracle = torch.rand(RANKED + WINDOW)
    ranking = oracle[:RANKED].clone()
    ranking[ranking.argmin()] = math.nan
    got = measure(_study(oracle), torch.stack((ranking, oracle[:RANKED])), 0.3, needed=oracle > 0.6)
    assert all(values[0] == values[1] for values in got)


def test_a_budget_of_the_window_alone_is_refused() -> None:
    with pytest.raises(CaptureError, match="longer prompts or a higher keep rate"):
        measure(_study(torch.rand(RANKED + WINDOW)), torch.rand(1, RANKED), 0.05)


def test_curves_and_summaries_are_means_over_the_right_things() -> None:
    studies = _studies()
    report = rank_report.build(studies, ["claa", "fastkv"], keep_rate=0.25, scored=4)
    assert (report.first_layer, report.last_layer, report.layers) == (2, 6, 8)
    by_name = {row.ranker: row for row in report.rankers}
    assert list(by_name) == ["claa", "fastkv", "oracle"]
    curve = by_name["fastkv"].curves["mass"]
    kept = []
    for study in (s.study for s in studies):
        rankings = torch.stack([study.rank(rankers.FastKV(), [layer]) for layer in range(8)])
        kept.append(measure(study, rankings, 0.25).mass.tolist())
    by_layer = [sum(column) / 4 for column in zip(*kept, strict=True)]
    assert curve.mean == pytest.approx(by_layer)
    own = [sum(row[2:7]) / 5 for row in kept]
    mean = sum(own) / 4
    sem = math.sqrt(sum((x - mean) ** 2 for x in own) / 3 / 4)
    assert (curve.summary.mean, curve.summary.standard_error) == pytest.approx((mean, sem))
    assert curve.summary.worst == min(by_layer[2:7]) == by_layer[curve.summary.worst_layer]
    assert curve.summary.half_depth == pytest.approx(by_layer[3])
    assert curve.summary.step == pytest.approx(sum(abs(by_layer[i + 1] - by_layer[i]) for i in range(2, 6)) / 4)
    center = sum(by_layer[2:7]) / 5
    assert curve.summary.spread == pytest.approx(math.sqrt(sum((x - center) ** 2 for x in by_layer[2:7]) / 5))


def test_a_ranker_of_several_layers_reads_the_last_n_up_to_the_layer() -> None:
    names = ["claa", "claa:last=off,carry=0", "claa:paper", "fastkv", "claa:paper,heads=sum"]
    report = rank_report.build(_studies(), names, keep_rate=0.25, scored=2)
    recall = {row.ranker: row.curves["recall"].mean for row in report.rankers}
    good = {name: [layer for layer, value in enumerate(values) if value > 0.6] for name, values in recall.items()}
    assert good["fastkv"] == [5] and good["claa:last=off,carry=0"] == good["claa:paper"] == [5, 6]
    assert report.by_source.keys() == {"prose", "repeated"} and report.prompts == {"prose": 2, "repeated": 2}
    ablated = [row.ranker for row in report.ablation]
    assert len(ablated) == len(set(ablated)) == 21
    by_name = {row.ranker: row.curves["recall"].mean for row in report.ablation}
    assert by_name["n=2 claa"] == recall["claa"]
    assert by_name["n=2 claa:paper"] == recall["claa:paper"] != by_name["n=2 claa:queries=sum"]
    alone = rank_report.build(_studies(), names, keep_rate=0.25, scored=1)
    recall = {row.ranker: row.curves["recall"].mean for row in alone.rankers}
    assert recall["claa:paper,heads=sum"] == pytest.approx(recall["fastkv"])  # z keeps the order of a single row


def test_claa_is_held_against_the_others_and_itself_prompt_by_prompt() -> None:
    report = rank_report.build(_studies(), ["claa", "fastkv"], keep_rate=0.25, scored=2)
    means = {row.ranker: row.curves["mass"].summary.mean for row in (*report.rankers, *report.ablation)}
    assert [d.other for d in report.differences] == ["fastkv", "oracle"]
    assert report.differences[0].mean.mean == pytest.approx(means["claa"] - means["fastkv"])
    assert report.differences[1].gap_closed is None  # nothing is better than the oracle
    assert [d.other for d in report.effects] == [
        *("n=1 claa", "n=4 claa", "n=8 claa"),
        *("n=2 claa:zscore=off", "n=2 claa:heads=sum", "n=2 claa:pool=after"),
        *("n=2 claa:carry=0", "n=2 claa:last=off", "n=2 claa:queries=sum"),
    ]
    assert all(d.mean.mean == pytest.approx(means["claa"] - means[d.other]) for d in report.effects)
    assert rank_report.build(_studies(), ["uniform"], keep_rate=0.25, scored=4).differences == []


def test_answers_are_measured_over_the_prompts_that_name_them() -> None:
    needed = torch.zeros(RANKED + WINDOW, dtype=torch.bool)
    needed[10:14] = True
    studies = _studies()
    some = [msgspec.structs.replace(s, needed=needed if i != 1 else None) for i, s in enumerate(studies)]
    report = rank_report.build(some, ["claa", "fastkv"], keep_rate=0.25, scored=2)
    own = [measure(s.study, s.study.rank(rankers.FastKV(), [5])[None], 0.25, needed).answer[0] for s in studies]
    row = {row.ranker: row for row in report.rankers}["fastkv"]
    assert row.curves["answer"].mean[5] == pytest.approx((own[0] + own[2] + own[3]) / 3)
    assert (row.curves["answer"].prompts, row.curves["mass"].prompts) == (3, len(studies))
    assert [d.measure for d in report.differences] == ["mass", "mass", "answer", "answer"]
    one = [msgspec.structs.replace(s, needed=needed if i == 1 else None) for i, s in enumerate(studies)]
    report = rank_report.build(one, ["claa"], keep_rate=0.25, scored=2)
    assert "answer" not in report.rankers[0].curves and {d.measure for d in report.effects} == {"mass"}


def test_an_unusual_n_is_ablated_too() -> None:
    report = rank_report.build(_studies(), ["claa"], keep_rate=0.25, scored=3)
    assert len(report.ablation) == 25 and report.effects[0].ours == "n=3 claa"


def test_rankings_made_elsewhere_stand_beside_the_others() -> None:
    studies = [msgspec.structs.replace(s, given={"specprefill": -s.study.oracle}) for s in _studies()]
    report = rank_report.build(studies, ["uniform"], keep_rate=0.25, scored=4)
    rho = {row.ranker: row.curves["rho"].mean for row in report.rankers}
    assert rho["oracle"] == pytest.approx([1.0] * LAYERS) and rho["specprefill"] == pytest.approx([-1.0] * LAYERS)


def test_too_few_prompts_and_unknown_rankers_are_refused() -> None:
    with pytest.raises(CaptureError, match="two or more"):
        rank_report.build(_studies(1), ["claa"], keep_rate=0.25, scored=4)
    with pytest.raises(RankerError, match="no such name"):
        rank_report.build(_studies(), ["snapkv"], keep_rate=0.25, scored=4)


def test_the_tables_and_the_plot_show_the_report(tmp_path: Path) -> None:
    report = rank_report.build(_studies(), ["claa", "uniform"], keep_rate=0.25, scored=4)
    console = Console(width=80, file=io.StringIO())
    for table in rank_table.tables(report):
        console.print(table)
    text = console.file.getvalue()
    summary = report.rankers[0].curves["mass"].summary
    assert f"{summary.mean:.3f} ± {summary.standard_error:.3f}" in text
    assert f"{summary.worst:.3f} @{summary.worst_layer}" in text
    assert "n=8 claa:zscore=off,heads=sum" in text and "prose (2)" in text and "…" not in text
    effect = report.effects[-1].mean
    assert f"{effect.mean:+.3f} ± {effect.high - effect.mean:.3f}" in text
    rank_plot.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_its_files_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    directory = tiny_models.build("llama", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    forwards = []
    loaded.register_forward_hook(lambda *call: forwards.append(call))
    monkeypatch.setattr(models, "load_model", lambda path: (loaded, None))
    lines = [{"input_ids": tiny_models.prompt(200, seed), "source": "random"} for seed in range(3)]
    (tmp_path / "prompts").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["rank-report", "--model", str(directory), "--prompts", str(tmp_path / "prompts")]
    command += ["--studies", str(tmp_path / "studies"), "--out", str(tmp_path / "out"), "--max-answer-tokens", "2"]

    assert main([*command, "--limit", "2"]) == 0
    assert len(forwards) == 4
    assert main(command) == 0
    assert len(forwards) == 6  # the third prompt alone
    report = msgspec.json.decode((tmp_path / "out/rank-report.json").read_bytes(), type=rank_report.Report)
    assert report.prompts == {"random": 3} and report.tokens == (200, 200) and "torch" in report.versions
    assert (tmp_path / "out/rank-report.png").is_file()
    orders = load_rankings(tmp_path / "out/oracle.jsonl")
    assert list(orders) == [prompt.key for prompt in load_prompts(tmp_path / "prompts")]
    assert all(sorted(order) == list(range(200)) for order in orders.values())

    def refused(*changed: str) -> str:
        capsys.readouterr()
        assert main([*command, *changed]) == 1
        return capsys.readouterr().err

    assert "no such name" in refused("--rankers", "claa", "snapkv")
    assert "longer prompts" in refused("--keep-rate", "0.01")
    assert len(forwards) == 6
    (tmp_path / "prompts").write_text('{"prompt": ""}\n')
    assert "line 1" in refused()
