"""What `benchmarks.router` makes of answers: hit rates, prefixes found, groups that went to both servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.router import Asked, NoRouter, failures_of, main, prompts_of, router_version, summary

PREFIXES = [1000, 800]
ASKED = [
    Asked(group=0, server="first", prompt=1016, cached=0, pruned=True),
    Asked(group=1, server="second", prompt=816, cached=0, pruned=True),
    Asked(group=0, server="first", prompt=1020, cached=988, pruned=True),  # all but the window, and 12 of the prefix
    Asked(group=0, server="second", prompt=1020, cached=0, pruned=True),  # the other server has none of it
    Asked(group=1, server="second", prompt=900, cached=800, pruned=True),  # all of the prefix
    Asked(group=1, server="second", prompt=900, cached=799, pruned=True),  # one token short
]


def test_what_is_counted() -> None:
    found = summary(ASKED, PREFIXES)
    assert (found["requests"], found["pruned"]) == (6, 6)
    assert found["hit rate"] == pytest.approx((988 + 800 + 799) / (1016 + 816 + 1020 + 1020 + 900 + 900), abs=1e-4)
    assert (found["prefix found"], found["later requests"], found["share of prefixes found"]) == (2, 4, 0.5)
    assert found["tokens computed on a hit"] == [32, 101]
    assert (found["groups"], found["groups on more than one server"]) == (2, 1)
    first, second = found["servers"]["first"], found["servers"]["second"]
    assert first == {
        "requests": 2,
        "groups": 1,
        "prompt tokens": 2036,
        "cached tokens": 988,
        "hit rate": pytest.approx(988 / 2036, abs=1e-4),
    }
    assert (second["requests"], second["groups"], second["cached tokens"]) == (4, 2, 1599)


def test_one_request_of_each_group_could_find_nothing() -> None:
    found = summary(ASKED[:2], PREFIXES)
    assert (found["later requests"], found["share of prefixes found"], found["hit rate"]) == (0, None, 0)


def pair(**changed: Any) -> dict[str, Any]:
    servers: dict[str, Any] = {"first": {}, "second": {}}
    computed = {"tokens computed on a hit": [32, 40]}
    return {"requests": 6, "pruned": 0, "prefix found": 4, "servers": servers, **computed, **changed}


@pytest.mark.parametrize(
    ("stock", "pruned", "words"),
    [
        ({}, {"pruned": 6}, []),
        (
            {},
            {"pruned": 6, "tokens computed on a hit": [31, 40]},
            ["a pruned hit computed 31 tokens, fewer than the window"],
        ),
        (
            {"prefix found": 2},
            {"pruned": 6},
            ["nothing was shown: stock servers found as many prefixes behind round_robin"],
        ),
        ({}, {"pruned": 5}, ["pruned: 5 requests were pruned, not 6"]),
        ({"pruned": 1}, {"pruned": 6}, ["stock: 1 requests were pruned, not 0"]),
        ({}, {"pruned": 6, "prefix found": 3}, ["pruned servers found fewer prefixes than stock ones"]),
        ({"prefix found": 0}, {"pruned": 6}, ["nothing was shown: stock servers found no prefix"]),
        (
            {"servers": {"first": {}}},
            {"pruned": 6},
            ["nothing was shown: of the stock servers, only first was asked"],
        ),
    ],
)
def test_what_fails(stock: dict[str, Any], pruned: dict[str, Any], words: list[str]) -> None:
    control = {"stock": {"prefix found": 2}, "pruned": {"prefix found": 2}}
    assert failures_of({"stock": pair(**stock), "pruned": pair(**pruned)}, control) == words


def test_every_round_asks_each_group_once_and_a_seed_repeats_it() -> None:
    rounds = prompts_of(groups=4, rounds=3, seed=5)
    assert rounds == prompts_of(groups=4, rounds=3, seed=5) != prompts_of(groups=4, rounds=3, seed=6)
    assert [sorted(group for group, _ in asked) for asked in rounds] == [[0, 1, 2, 3]] * 3
    texts = [text for asked in rounds for _, text in asked]
    assert len(set(texts)) == 12
    assert len({text.partition(".\n\n")[0] for text in texts}) == 4


def test_without_the_router_nothing_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoRouter, match="pip install sglang-router"):
        router_version(tmp_path)
    out = tmp_path / "router.json"
    assert main(["--router-from", str(tmp_path), "--out", str(out)]) == 2
    assert "pip install sglang-router" in capsys.readouterr().err and not out.exists()


def test_a_router_in_a_folder_is_found(tmp_path: Path) -> None:
    info = tmp_path / "sglang_router-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-router\nVersion: 1.2.3\n")
    assert router_version(tmp_path) == "1.2.3"
