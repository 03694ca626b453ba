"""`claa-sglang verify` against servers that are right, or wrong in one way: the claim that this breaks fails, alone."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from claa_sglang import cli
from claa_sglang.tools import streaming
from claa_sglang.verify import client
from tests.fast.verify.fake_server import TTFT as SECONDS
from tests.fast.verify.fake_server import VOCABULARY, Fake, serving

SMALL = ("--tokens", "200", "--ttft-tokens", "200", "--prompts", "2", "--needles", "2", "--pairs", "5")
SAME, HIT, ISOLATED, WHOLE, NEEDLES, TTFT = range(6)
REQUESTS = 2 + 11 * 2 + 2 * 2 + 2 * 6  # two before; of a prompt; of a needle; of a pair, one to warm up


def timed(*args: Any) -> tuple[float, dict[str, Any]]:
    """The server says how long it took, as a real clock would say what else runs here."""
    _, last = streaming.timed(*args)
    return last["meta_info"]["ttft"], last


class Run(NamedTuple):
    """One run: its exit status, claims, the whole record, and what it printed."""

    fake: Fake
    status: int
    claims: list[dict[str, Any]]
    record: dict[str, Any]
    out: str
    err: str

    def outcomes(self, place: int) -> list[str]:
        return [one["outcome"] for one in self.claims[place]["comparisons"]]

    def marked(self, mark: str) -> int:
        """Rows of the table with it."""
        return len(re.findall(rf"^{mark}  ", self.out, re.MULTILINE))

    def options(self) -> list[dict[str, Any]]:
        return [body["sampling_params"]["custom_params"]["claa"] for body in self.fake.asked]


def verify(fake: Fake, home: Path, *more: str) -> Run:
    file, out, err = home / "v.json", io.StringIO(), io.StringIO()
    with serving(fake) as url, mock.patch.object(client, "timed", timed):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(["verify", "--url", url, *SMALL, "--out", str(file), *more])
    record = json.loads(file.read_text(), parse_constant=pytest.fail)  # Infinity and NaN are no JSON
    return Run(fake, status, record["claims"], record, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return verify(Fake(), tmp_path_factory.mktemp("right"))


def test_a_server_that_is_right(right: Run) -> None:
    assert right.status == 0 and right.record["ok"] and [claim["ok"] for claim in right.claims] == [True] * 6
    assert [right.outcomes(place) for place in range(4)] == [["identical"] * count for count in (4, 6, 4, 2)]
    assert [row["found"] for row in right.claims[NEEDLES]["data"]["needles"]] == [[True, True]] * 2
    ratio, times = (right.claims[TTFT]["data"][name] for name in ("ratio", "ttft"))
    assert ratio["low"] == ratio["median"] == ratio["high"] == SECONDS["pruned"] / SECONDS["dense"]
    assert (times["pruned"], times["dense"]) == ([SECONDS["pruned"]] * 5, [SECONDS["dense"]] * 5)
    assert right.marked("ok") == 6 and "6 of 6 claims hold." in right.out
    assert "request" in right.err, "no progress was shown"


def test_what_it_cost_is_what_the_server_saw(right: Run) -> None:
    fake, cost = right.fake, right.record["cost"]
    assert cost["requests"] == len(fake.asked) == REQUESTS
    assert cost["prompt_tokens"] == sum(len(body["text"].split()) for body in fake.asked)
    assert cost["cache_entered_tokens"] == fake.entered and cost["pool_tokens"] == 100_000
    assert f"{REQUESTS} requests" in right.out and f"at most {fake.entered:,} tokens" in right.out
    assert right.record["plan"]["pool"] == 100_000 and f"About {REQUESTS} requests" in right.err


def test_pairs_take_turns(right: Run) -> None:
    """Each is cold both ways, over a text of its own, and the other one goes first in the next."""
    timed = [body for body in right.fake.asked if body.get("stream")]
    pairs = list(zip(timed[::2], timed[1::2], strict=True))
    assert len(pairs) == 6 and all(one["text"] == other["text"] for one, other in pairs)
    assert len({one["text"].split()[0] for one, _ in pairs}) == 6
    first = [body["sampling_params"]["custom_params"]["claa"].get("enabled", True) for body in timed[::2]]
    assert first == [False, True] * 3


def test_it_leaves_the_cache_of_others_alone(right: Run, tmp_path: Path) -> None:
    """No flush, no key that anybody else could use, and nothing to be made dense while the server is idle."""
    again = verify(Fake(), tmp_path)
    assert set(right.fake.paths) == {"/server_info", "/model_info", "/generate"}
    keys = [{body["extra_key"] for body in one.fake.asked} for one in (right, again)]
    assert not keys[0] & keys[1] and all(key.startswith("claa-verify-") for key in keys[0])
    assert all(one.get("enabled") is False or one["finish"] is False for one in right.options())
    beginnings = [{body["text"].split()[0] for body in one.fake.asked} for one in (right, again)]
    assert not beginnings[0] & beginnings[1], "two runs asked for texts that begin alike"


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
def test_a_server_that_is_wrong(fault: str, tmp_path: Path) -> None:
    run = verify(Fake(fault), tmp_path)
    failed = {place for place, claim in enumerate(run.claims) if claim["ok"] is False}
    assert failed and failed <= WRONG[fault] and min(WRONG[fault]) in failed
    assert run.status == 1 and not run.record["ok"]
    assert "FAILED" in run.out and run.marked("NO") == len(failed)
    assert ("it was pruned, though its switch was off" in run.out) == (fault == "the switch is ignored")


def test_near_ties_are_counted_and_fail_nothing(tmp_path: Path) -> None:
    """A claim of which nothing but near-ties is seen is not shown either."""
    run = verify(Fake("a near-tie on a hit"), tmp_path)
    assert run.status == 0 and run.claims[HIT]["ok"] is None and set(run.outcomes(HIT)) == {"near-tie"}
    assert run.claims[SAME]["ok"] is True
    assert "6 near-ties" in run.out and "1 undecided" in run.out and "leads by 1e-06 nats" in run.out


@pytest.mark.parametrize(
    ("fault", "info", "place", "says"),
    [
        ("nothing is cached", {}, HIT, "0 tokens were cached, and then 0"),
        ("nothing is cached", {"disable_radix_cache": True}, HIT, "no prefix cache (--disable-radix-cache)"),
        ("finds nothing", {}, NEEDLES, "0 of 0 that dense finds"),
    ],
)
def test_what_shows_nothing_is_undecided(
    fault: str, info: dict[str, Any], place: int, says: str, tmp_path: Path
) -> None:
    run = verify(Fake(fault, info=info), tmp_path)
    assert run.status == 0 and run.claims[place]["ok"] is None
    assert says in run.out and run.marked("--") == 1


def test_a_hit_is_asked_for_until_a_replica_has_it(tmp_path: Path) -> None:
    run = verify(Fake(info={"dp_size": 2}), tmp_path)
    assert run.status == 0 and run.outcomes(HIT) == ["identical"] * 6
    assert REQUESTS < len(run.fake.asked) <= run.record["plan"]["requests"]


def test_times_of_prompts_that_are_not_cold_are_left_out(tmp_path: Path) -> None:
    """Something before the server drops keys and adds a beginning of its own to every prompt."""
    fake = Fake("keys are ignored", tokenizer=False)
    generate = fake.generate

    def with_beginning(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return generate({**body, "input_ids": [1, 2, 3, *body["input_ids"]]})

    fake.generate = with_beginning  # type: ignore[method-assign]
    times = verify(fake, tmp_path).claims[TTFT]
    assert times["ok"] is None and "fewer than 5 pairs" in times["found"]
    assert any("3 tokens were cached" in line for line in times["more"])


def test_a_server_without_a_tokenizer(tmp_path: Path) -> None:
    run = verify(Fake(tokenizer=False), tmp_path)
    assert run.status == 0 and [claim["ok"] for claim in run.claims] == [True] * 4 + [None, True]
    ids = [token for body in run.fake.asked for token in body["input_ids"]]
    assert max(ids) > VOCABULARY - 20 and all(0 <= token < VOCABULARY for token in ids)
    assert {len(body["input_ids"]) for body in run.fake.asked} == {200}


def test_the_key_is_sent_and_not_recorded(tmp_path: Path) -> None:
    run = verify(Fake(key="secret"), tmp_path, "--api-key", "secret")
    assert run.status == 0 and "secret" not in json.dumps(run.record) + run.out + run.err


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
    assert bool(fake.asked) == bool(re.search("Cost: [1-9]", said.err)) or name == "no report"


def test_an_interrupted_run_says_what_it_cost(capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    with serving(fake) as url, mock.patch.object(client, "timed", side_effect=KeyboardInterrupt):
        assert cli.main(["verify", "--url", url, *SMALL]) == 130
    said = capsys.readouterr()
    assert f"Cost: {len(fake.asked)} requests" in said.err and not said.out
