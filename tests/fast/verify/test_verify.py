"""`claa-sglang verify` against servers that are right, or wrong in one way: the claim that this breaks fails, alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from claa_sglang import cli
from tests.fast.verify.fake_server import VOCABULARY, Fake, serving

SMALL = ("--tokens", "200", "--ttft-tokens", "200", "--prompts", "2", "--needles", "2", "--pairs", "5")
SAME, HIT, ISOLATED, WHOLE, NEEDLES, TTFT = range(6)
REQUESTS = 2 + 11 * 2 + 2 * 2 + 2 * 6  # two before; of a prompt; of a needle; of a pair, one to warm up


def verify(fake: Fake, out: Path, *more: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Exit status, claims and the whole record."""
    with serving(fake) as url:
        status = cli.main(["verify", "--url", url, *SMALL, "--out", str(out), *more])
    record = json.loads(out.read_text(), parse_constant=pytest.fail)  # Infinity and NaN are no JSON
    return status, record["claims"], record


def outcomes(claim: dict[str, Any]) -> list[str]:
    return [one["outcome"] for one in claim["comparisons"]]


def test_a_server_that_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    status, claims, record = verify(fake, tmp_path / "v.json")
    assert status == 0 and record["ok"] and [claim["ok"] for claim in claims] == [True] * 6
    assert [set(outcomes(claim)) for claim in claims[:4]] == [{"identical"}] * 4
    assert [len(claim["comparisons"]) for claim in claims] == [4, 6, 4, 2, 0, 0]
    assert [row["found"] for row in claims[NEEDLES]["data"]["needles"]] == [[True, True]] * 2
    ratio = claims[TTFT]["data"]["ratio"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] < 1 and ratio["coverage"] == 1 - 2 / 32
    said = capsys.readouterr()
    assert len(re.findall(r"^ok  ", said.out, re.MULTILINE)) == 6 and "6 of 6 claims hold." in said.out
    assert "request" in said.err, "no progress was shown"


def test_what_it_cost_is_what_the_server_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    _, _, record = verify(fake, tmp_path / "v.json")
    cost = record["cost"]
    assert cost["requests"] == len(fake.asked) == REQUESTS
    assert cost["prompt_tokens"] == sum(len(body["text"].split()) for body in fake.asked)
    assert cost["cache_entered_tokens"] == fake.entered and cost["pool_tokens"] == 100_000
    said = capsys.readouterr().out
    assert f"{REQUESTS} requests" in said and f"at most {fake.entered:,} tokens" in said


def test_it_leaves_the_cache_of_others_alone(tmp_path: Path) -> None:
    """No flush, no key that anybody else could use, and nothing to be made dense while the server is idle."""
    fake, again = Fake(), Fake()
    for one in (fake, again):
        verify(one, tmp_path / "v.json")
    assert set(fake.paths) == {"/server_info", "/model_info", "/generate"}
    keys = [{body["extra_key"] for body in one.asked} for one in (fake, again)]
    assert not keys[0] & keys[1] and all(key.startswith("claa-verify-") for key in keys[0])
    options = [body["sampling_params"]["custom_params"]["claa"] for body in fake.asked]
    assert all(one.get("enabled") is False or one["finish"] is False for one in options)
    beginnings = {body["text"].split()[0] for body in fake.asked} & {body["text"].split()[0] for body in again.asked}
    assert not beginnings, "two runs asked for texts that begin alike"


WRONG = {
    "dense changes": {SAME, HIT, WHOLE},
    "dense changes beside pruned": {SAME},
    "the switch is ignored": {SAME, HIT, WHOLE},
    "a dense hit differs": {HIT},
    "a pruned hit differs": {HIT, ISOLATED},  # of requests at once, one goes on from what the other cached
    "a hit keeps others": {HIT, ISOLATED},
    "a hit is far off": {HIT, ISOLATED},
    "answers leak": {ISOLATED},
    "keep rate 1 drops": {WHOLE},
    "pruned loses needles": {NEEDLES},
    "pruned is slow": {TTFT},
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_server_that_is_wrong(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, claims, record = verify(Fake(fault), tmp_path / "v.json")
    failed = {place for place, claim in enumerate(claims) if claim["ok"] is False}
    assert failed and failed <= WRONG[fault] and min(WRONG[fault]) in failed
    assert status == 1 and not record["ok"]
    said = capsys.readouterr().out
    assert "FAILED" in said and len(re.findall(r"^NO  ", said, re.MULTILINE)) == len(failed)


def test_near_ties_are_counted_and_fail_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A claim of which nothing but near-ties is seen is not shown either."""
    status, claims, _ = verify(Fake("a near-tie on a hit"), tmp_path / "v.json")
    assert status == 0 and claims[HIT]["ok"] is None and set(outcomes(claims[HIT])) == {"near-tie"}
    assert claims[SAME]["ok"] is True
    said = capsys.readouterr().out
    assert "6 near-ties" in said and "1 undecided" in said and "leads by 1e-06 nats" in said


@pytest.mark.parametrize(
    ("fault", "place", "says"),
    [
        ("nothing is cached", HIT, "0 tokens were cached, and then 0"),
        ("finds nothing", NEEDLES, "pruned finds 0 of 0 that dense finds"),
    ],
)
def test_what_shows_nothing_is_undecided(
    fault: str, place: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, claims, _ = verify(Fake(fault), tmp_path / "v.json")
    assert status == 0 and claims[place]["ok"] is None
    assert says in capsys.readouterr().out


def test_a_server_without_a_prefix_cache(tmp_path: Path) -> None:
    fake = Fake("nothing is cached", info={"disable_radix_cache": True})
    status, claims, _ = verify(fake, tmp_path / "v.json")
    assert status == 0 and claims[HIT]["ok"] is None and "--disable-radix-cache" in claims[HIT]["found"]


def test_times_of_prompts_that_are_not_cold_are_left_out(tmp_path: Path) -> None:
    """Something before the server drops keys and adds a beginning of its own to every prompt."""
    fake = Fake("keys are ignored", tokenizer=False)
    generate = fake.generate

    def with_beginning(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return generate({**body, "input_ids": [1, 2, 3, *body["input_ids"]]})

    fake.generate = with_beginning  # type: ignore[method-assign]
    _, claims, _ = verify(fake, tmp_path / "v.json")
    assert claims[TTFT]["ok"] is None and "fewer than 5 pairs" in claims[TTFT]["found"]
    assert any("3 tokens were cached" in line for line in claims[TTFT]["more"])


def test_a_server_without_a_tokenizer(tmp_path: Path) -> None:
    fake = Fake(tokenizer=False)
    status, claims, _ = verify(fake, tmp_path / "v.json")
    assert status == 0 and [claim["ok"] for claim in claims] == [True] * 4 + [None, True]
    ids = [token for body in fake.asked for token in body["input_ids"]]
    assert max(ids) > VOCABULARY - 20 and all(0 <= token < VOCABULARY for token in ids)
    assert {len(body["input_ids"]) for body in fake.asked} == {200}


def test_the_key_is_sent_and_not_recorded(tmp_path: Path) -> None:
    status, _, record = verify(Fake(key="secret"), tmp_path / "v.json", "--api-key", "secret")
    assert status == 0 and "secret" not in json.dumps(record)


ERRORS: dict[str, tuple[Fake, tuple[str, ...], str]] = {
    "no CLAA": (Fake(claa=False), (), "serves no CLAA: start it with --enable-claa"),
    "a key is wanted": (Fake(key="k"), (), "wants an API key: give it with --api-key"),
    "another key": (Fake(key="k"), ("--api-key", "other"), "refuses the given --api-key"),
    "never pruned": (Fake("never prunes"), (), "is not pruned (planted reason): give another --tokens"),
    "no report": (Fake("no report"), (), "has no report of CLAA"),
    "breaks": (Fake("breaks"), (), "/generate: HTTP 500"),
    "too short": (Fake(), ("--tokens", "64"), "--tokens 64: the server prunes prompts above 64 tokens"),
    "too long": (Fake(), ("--ttft-tokens", "20000"), "--ttft-tokens 20000: the server takes prompts of 20000 tokens"),
    "no SGLang": (Fake(), ("--url", "{url}/elsewhere"), "so it is no SGLang server: correct --url"),
    "no server": (Fake(), ("--url", "http://127.0.0.1:9"), "start a server, or correct --url"),
    "no scheme": (Fake(), ("--url", "127.0.0.1"), "correct --url, such as http://127.0.0.1:30000"),
    "no tokenizer": (Fake(), ("--tokenizer", "/nowhere"), "--tokenizer /nowhere cannot be loaded"),
    "no folder": (Fake(), ("--out", "/proc/nothing/v.json"), "/proc/nothing"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_that_says_what_to_do(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake, more, says = ERRORS[name]
    with serving(fake) as url:
        status = cli.main(["verify", "--url", url, *SMALL, *(word.format(url=url) for word in more)])
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("claa-sglang verify: ")]
    assert status == 1 and says in line and "Traceback" not in said.err and not said.out
