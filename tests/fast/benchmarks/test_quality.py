"""benchmarks.eval_quality with canned answers: what is asked, what is kept of it, and what is on record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import eval_quality
from benchmarks.quality.answers import Answers, AnswersError
from benchmarks.quality.asking import check_report
from benchmarks.quality.settings import RankingError, Setting, load_rankings, options, settings
from claa_sglang.tasks.record import save
from tests.fast.quality_server import PROMPTS, Server, result


def test_accuracies_and_pairs(server: Server, command: list[str], tmp_path: Path) -> None:
    more = ["--rankers", "claa", "fastkv", "--keep-rates", "0.25", "0.5", "--kl-prompts", "3", "--sources-too"]
    assert eval_quality.main([*command, *more]) == 0
    assert len(server.bodies) == 40 * 5 and server.most == 7
    found = {(c["task"], c["source"], c["ranker"], c["keep_rate"]): c for c in result(tmp_path)["cells"]}
    assert len(found) == 3 * 2 * 5
    dense, half = found["a", "prose", "dense", 1.0], found["all", "all", "fastkv", 0.5]
    assert dense["n"] == 20 and dense["accuracy"][0] == 1 and dense["accuracy"][1] < 0.9
    assert half["n"] == 40 and half["accuracy"][0] == 0.5
    beside = half["to_dense"]
    assert beside["difference"][0] == -0.5 and (beside["only_dense"], beside["only_pruned"]) == (20, 0)
    assert beside["p_value"] == pytest.approx(2 * 0.5**20, rel=1e-3) and beside["agreement"][0] == 0.5
    # Token 5 has 0.5 dense and 0.25 here, token 6 has 0.1 in both, and the others what is left.
    expected = 0.5 * math.log(2) + 0.4 * math.log(0.4 / 0.65)
    assert beside["first_token_kl"][0] == pytest.approx(expected, abs=1e-3)
    assert result(tmp_path)["settings"] == [
        {"ranker": ranker, "keep_rate": rate, "ran": f"{ranker}:x"}
        for ranker in ("claa", "fastkv")
        for rate in (0.25, 0.5)
    ]


def test_a_record_is_short(server: Server, command: list[str], tmp_path: Path) -> None:
    """Sources, and what one task says of agreement and first tokens, are there when asked for; nothing is null."""
    prompts = [
        msgspec.structs.replace(p, source=s, seed=i, input_ids=[*p.input_ids, j])
        for i, p in enumerate(PROMPTS)
        for j, s in enumerate(("prose", "repeated"))
    ]
    save(prompts, tmp_path / "prompts.jsonl.gz")
    asked = [*command, "--keep-rates", "0.3"]
    eval_quality.main([*asked, "--sources-too"])
    whole = (tmp_path / "q.json").read_text()
    eval_quality.main(asked)
    text = (tmp_path / "q.json").read_text()
    cells = json.loads(text)["cells"]
    assert len(json.loads(whole)["cells"]) == 3 * 3 * 2 and len(cells) == 3 * 2 and "null" not in str(cells)
    assert len(text) < len(whole) / 2
    one, every = (next(c for c in cells if c["task"] == t and c["ranker"] == "claa") for t in ("a", "all"))
    assert set(every["to_dense"]) - set(one["to_dense"]) == {"agreement", "first_token_kl", "first_token_n"}
    assert all(len(repr(end).lstrip("-0.")) <= 5 for cell in cells for end in cell["accuracy"])


def test_the_switch_of_each_request(server: Server, command: list[str]) -> None:
    eval_quality.main([*command, "--rankers", "claa", "gemfilter", "--keep-rates", "0.5"])
    sent = [body["sampling_params"]["custom_params"]["claa"] for body in server.bodies]
    pruned = {"policy": "always", "keep_rate": 0.5, "finish": False}
    kinds = [{"enabled": False}, pruned, {**pruned, "ranker": "gemfilter"}]
    assert [sent.count(kind) for kind in kinds] == [40, 40, 40]


def test_a_stopped_run_goes_on(server: Server, command: list[str], tmp_path: Path) -> None:
    server.fail_after = 33
    with pytest.raises(RuntimeError, match="planted"):
        eval_quality.main([*command, "--keep-rates", "0.5"])
    with (tmp_path / "q.answers.jsonl").open("ab") as file:
        file.write(b'{"prompt": "cut off' + 100_000 * b".")
    server.fail_after = math.inf
    eval_quality.main([*command, "--keep-rates", "0.5"])
    assert len(server.bodies) == 80 and (tmp_path / "q.answers.jsonl").read_bytes().endswith(b"}\n")
    eval_quality.main([*command, "--keep-rates", "0.5"])
    assert len(server.bodies) == 80, "nothing was missing"
    assert {cell["n"] for cell in result(tmp_path)["cells"]} == {20, 40}


def test_what_a_stopped_run_has_is_counted_without_a_server(
    server: Server, command: list[str], tmp_path: Path, capsys: Any
) -> None:
    server.fail_after = 33
    with pytest.raises(RuntimeError, match="planted"):
        eval_quality.main([*command, "--keep-rates", "0.5"])
    prompts, *_ = command
    answers, out = tmp_path / "q.answers.jsonl", tmp_path / "q.json"
    count = [prompts, "--answers", str(answers), "--keep-rates", "0.5", "--out", str(out)]
    assert eval_quality.main(count) == 0
    found = result(tmp_path)
    assert found["model"] == "tiny" and found["count only"] and 0 < found["answered under every setting"] < 20
    with pytest.raises(AnswersError, match="--url or --engine"):
        eval_quality.main([prompts, "--answers", str(tmp_path / "none"), "--out", str(out)])
    with pytest.raises(SystemExit):
        eval_quality.main([prompts])
    assert "--answers to count" in capsys.readouterr().err


def test_answers_of_another_server_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Answers(path, {"model": "a", "claa": {"window": 8}}).close()
    Answers(path, {"model": "a", "claa": {"window": 8}}).close()
    with pytest.raises(AnswersError, match=r"another server \(claa differ\): name another file with --answers"):
        Answers(path, {"model": "a", "claa": {"window": 9}})


@pytest.mark.parametrize(
    ("claa", "why"),
    [
        (None, "start the server with --enable-claa"),
        ({"pruned": False, "reason": "too short", "prompt_tokens": 9}, "too short. Start the server with --claa-min"),
        ({"pruned": True, "keep_rate": 0.3, "prompt_tokens": 9}, "ran at keep rate 0.3"),
    ],
)
def test_a_request_that_ran_otherwise_is_no_measurement(claa: Any, why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        check_report({"claa": claa}, Setting("claa", 0.2))


def test_a_given_ranking_becomes_positions(tmp_path: Path) -> None:
    path = tmp_path / "oracle.jsonl"
    path.write_text('{"key": "k", "order": [3, 19, 0, 7, 1]}\n')
    rankings = load_rankings([f"oracle={path}"])
    sent = options(Setting("oracle", 0.2), "k", 20, window=2, rankings=rankings)
    assert sent == {"keep": [0, 3, 18, 19]}
    with pytest.raises(RankingError, match="prompt other is missing"):
        options(Setting("oracle", 0.2), "other", 20, window=2, rankings=rankings)
    with pytest.raises(RankingError, match="beyond its 19 tokens"):
        options(Setting("oracle", 0.2), "k", 19, window=2, rankings=rankings)
    with pytest.raises(RankingError, match="expected NAME=FILE"):
        load_rankings(["oracle"])


def test_settings_are_dense_and_every_pair() -> None:
    names = [setting.name for setting in settings(["claa", "uniform"], [0.1, 0.2])]
    assert names == ["dense", "claa 0.1", "claa 0.2", "uniform 0.1", "uniform 0.2"]


def test_each_may_also_decode_over_the_whole_prompt() -> None:
    names = [setting.name for setting in settings(["claa", "uniform"], [0.2], both_ways=True)]
    all_of_it = ", decoding over all"
    assert names == ["dense", "claa 0.2", f"claa{all_of_it} 0.2", "uniform 0.2", f"uniform{all_of_it} 0.2"]
    rankings = {"oracle": {"k": [18, 3]}}
    for ranker in ("claa", "uniform", "oracle"):
        plain, other = (
            options(Setting(ranker + way, 0.2), "k", 20, window=2, rankings=rankings) for way in ("", all_of_it)
        )
        assert other.pop("decode_dense_layers") > 1000 and other == plain
