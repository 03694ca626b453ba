"""Times beside dense and stock, and the figure of accuracy against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eval_quality, eval_quality_plot
from tests.fast.quality_server import PROMPTS, Server, result


def test_times_and_the_plot(server: Server, command: list[str], tmp_path: Path, capsys: Any) -> None:
    assert eval_quality.main([*command, "--keep-rates", "0.5"]) == 0
    assert eval_quality_plot.main([str(tmp_path / "q.json")]) == 1
    assert "it has no times: measure with --time" in capsys.readouterr().err
    assert eval_quality.main([*command, "--keep-rates", "0.5", "--time"]) == 0
    times = {time["ranker"]: time for time in result(tmp_path)["ttft"]}
    assert times["dense"]["ratio"] == 1 and times["claa"]["ratio"] > 0
    assert all(len(time["seconds"]) == 5 and time["length"] == 1024 for time in times.values())
    assert eval_quality_plot.main([str(tmp_path / "q.json"), "--task", "a"]) == 0
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("settings", [["0.5"], ["0.25", "0.5"]])
def test_times_beside_stock(
    server: Server, command: list[str], tmp_path: Path, monkeypatch: Any, settings: list[str]
) -> None:
    """Stock is asked without options of CLAA, once a round; every time has a ratio to it, and the plot uses them."""
    stock = Server()
    stock.seconds, server.seconds = 0.02, 0.01
    monkeypatch.setattr(eval_quality, "stock_of", lambda args, info: stock)
    assert eval_quality.main([*command, "--keep-rates", *settings, "--time", "--stock-url", "none"]) == 0
    assert len(stock.bodies) == 6 and not any("custom_params" in body["sampling_params"] for body in stock.bodies)
    assert [body["input_ids"] for body in stock.bodies] == [prompt.input_ids for prompt in PROMPTS[:6]]
    found = result(tmp_path)
    assert [one["ranker"] for one in found["ttft"]] == ["dense", *["claa"] * len(settings), "stock"]
    for one in found["ttft"]:
        least, middle, most = (one["to_stock"][name] for name in ("least", "median", "most"))
        assert least <= middle <= most
        assert middle == 1 if one["ranker"] == "stock" else 0.4 < middle < 0.9
    assert found["timed"] == "both over HTTP" and found["stock"]["dtype"] == "float32"
    assert eval_quality_plot.baseline(found["ttft"]) == "stock"
    assert eval_quality_plot.main([str(tmp_path / "q.json")]) == 0


def test_stock_must_be_the_same_model(monkeypatch: Any, capsys: Any) -> None:
    class Stock(Server):
        def __init__(self, urls: list[str], in_flight: int, claa: bool) -> None:
            super().__init__()
            assert (urls, in_flight, claa) == (["s"], 1, False)

        def info(self) -> dict[str, Any]:
            return super().info() | others

    monkeypatch.setattr(eval_quality, "UrlEndpoint", Stock)
    args = eval_quality.parse_args(["p", "--url", "u", "--time", "--stock-url", "s"])
    for others in ({"dtype": "bfloat16"}, {"model_path": "elsewhere/small"}):
        with pytest.raises(
            ValueError, match=f"s differs in {'dtype' if 'dtype' in others else 'model'}: start stock as"
        ):
            eval_quality.stock_of(args, Server().info())
    others = {"attention_backend": "fa3", "model_path": "elsewhere/tiny"}
    eval_quality.stock_of(args, Server().info())
    assert "stock differs in attention_backend" in capsys.readouterr().out
    for wrong, why in ((["--stock-url", "s"], "give --time"), (["--turns", "2", "--given", "a=b"], "later turns")):
        with pytest.raises(SystemExit):
            eval_quality.parse_args(["p", "--url", "u", *wrong])
        assert why in capsys.readouterr().err


def test_the_plot_has_lines_of_other_servers(tmp_path: Path) -> None:
    def record(model: str, *rankers: str) -> dict[str, Any]:
        entries = [{"ranker": ranker} for ranker in ("dense", *rankers)]
        return {"model": model, "cells": entries, "ttft": list(entries)}

    (tmp_path / "one.json").write_text(json.dumps(record("m", "claa")))
    (tmp_path / "two.json").write_text(json.dumps(record("m", "claa", "fastkv")))
    drawn = record("m", "claa")
    eval_quality_plot.add(drawn, f"steps={tmp_path / 'one.json'}")
    eval_quality_plot.add(drawn, f"other={tmp_path / 'two.json'}")
    names = ["dense", "claa", "steps", "other, claa", "other, fastkv"]
    assert [entry["ranker"] for entry in drawn["cells"]] == names == [entry["ranker"] for entry in drawn["ttft"]]
    for argument, why in (
        (f"{tmp_path / 'one.json'}", "expected LABEL=FILE"),
        (f"a={tmp_path / 'one.json'}", "is of m"),
    ):
        with pytest.raises(eval_quality_plot.PlotError, match=why):
            eval_quality_plot.add(record("n"), argument)


def test_times_of_another_machine(tmp_path: Path) -> None:
    """A ranker that has none there has those of another one."""
    accuracy = {"mean": 0.5, "low": 0.4, "high": 0.6}
    settings = (("dense", 1.0), ("claa", 0.2), ("fastkv", 0.2))
    cells = [{"task": "all", "source": "all", "length": 1000, "ranker": r, "keep_rate": k} for r, k in settings]
    record = {"model": "m", "device": "a GPU", "cells": [cell | {"accuracy": accuracy} for cell in cells], "ttft": []}
    times = [{"length": 1000, "ranker": r, "keep_rate": k, "ratio": 0.6 if k < 1 else 1.0} for r, k in settings[:2]]
    (tmp_path / "q.json").write_text(json.dumps(record))
    (tmp_path / "t.json").write_text(json.dumps({"device": "a CPU", "ttft": times}))
    assert eval_quality_plot.main([str(tmp_path / "q.json")]) == 1
    assert eval_quality_plot.main([str(tmp_path / "q.json"), "--times", str(tmp_path / "t.json")]) == 0
    assert (tmp_path / "q.png").exists()
    eval_quality_plot.add(record, f"steps={tmp_path / 'q.json'}={tmp_path / 't.json'}")
    assert [(t["ranker"], t["ratio"]) for t in record["ttft"]] == [("steps", 0.6)]
