"""What `benchmarks.answers_run` is to do, before it starts anything: plans, phases, prompts, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import answers_run
from benchmarks.answers import checks, fleet, lanes, phases, plan, prompts
from benchmarks.answers.plan import Model, PlanError
from claa_sglang.tasks.record import Prompt
from tests.fast.benchmarks.answers_items import SEED, cells, entries, of


def test_phases_leave_every_cell_alike() -> None:
    every = entries()
    first, others, rest = phases.phases(every, of, 6, SEED)
    assert sorted([*first, *others, *rest], key=str) == sorted(every, key=str)
    assert {one.length for one in [*first, *rest]} == {30} and {one.length for one in others} == {10, 20}
    assert set(cells(first).values()) == set(cells(rest).values()) == {3}
    (half, other) = phases.phases(entries(lengths=(5,)), of, 6, SEED)
    assert len(half) == len(other) == 12


def test_a_run_that_ends_early_has_balanced_cells() -> None:
    """The first half of the shards of a phase is a random half of it."""
    every = entries(tasks="abcd", lengths=(30,), count=100)
    done = phases.shards(every, 8)[:4]
    assert sorted(map(len, done)) == [100] * 4
    counts = cells([one for shard in done for one in shard])
    assert len(counts) == 8 and all(30 < count < 70 for count in counts.values())


def test_the_shipped_plan_is_one_that_runs() -> None:
    """Its commands are what eval_quality takes, every prompt is asked once, and timed servers keep their defaults."""
    whole = plan.load(plan.DEFAULT)
    checks.commands(whole, 4)
    for name, model in whole.models.items():
        made = checks._stand_ins(whole, model)
        work = lanes.work(name, model, made, 4)
        assert sum(len(step.items) for step in work.shards) == len(made[prompts.ANSWERS])
        assert model.count * len(whole.sources) >= 200, "prompts per task and length"
        assert [len(step.items) for step in work.times] == [2 * 2 * model.times.prompts] * 3
        lengths = [step.items[0].entry.length for step in work.times]
        assert lengths == sorted(model.lengths, reverse=True), "the longest first: it matters most"
    paths = {name: Path("/m", name) for name in whole.models}
    servers = {one.name: one for one in fleet.wanted(whole, paths, 4, cpu=False)}
    assert sorted(servers) == sorted(
        [f"qwen2.5-coder-0.5b.{kind}" for kind in ("claa0", "claa1", "claa2", "claa3", "stock0")]
        + [f"smollm2-135m-instruct.{kind}" for kind in ("claa1", "claa2", "stock1")]
    )
    fast = {name for name, one in servers.items() if "--cuda-graph-backend-prefill" in one.flags}
    assert fast == {name for name in servers if name[-1] not in "01"} | {"qwen2.5-coder-0.5b.claa1"}
    assert all(
        ("--enable-claa" in one.flags) != one.stock and "--max-total-tokens" in one.flags for one in servers.values()
    )


def test_the_quiet_plan_times_lengths_that_it_does_not_ask() -> None:
    whole = plan.load("quiet")
    checks.commands(whole, 1)
    (name, model), (other, small) = whole.models.items()
    assert whole.quiet and small.times is None and model.only_timed == [16384, 30000]
    made = checks._stand_ins(whole, model)
    work = lanes.work(name, model, made, 1)
    assert [step.items[0].entry.length for step in work.times] == [30000, 16384, 4096]
    assert all(len(step.items) == 2 and step.stock for step in work.times), "one of each form"
    assert {item.entry.length for step in work.shards for item in step.items} == {4096}
    paths = {one: Path("/m", one) for one in whole.models}
    assert [one.name for one in fleet.wanted(whole, paths, 1, cpu=False)] == [
        f"{name}.claa0",
        f"{name}.stock0",
        f"{other}.claa0",
    ]
    chunks = prompts.chunks(whole, paths)
    timed = [chunk for chunk in chunks if chunk.use == prompts.TIMES]
    assert {(chunk.model, chunk.length, chunk.count) for chunk in timed} == {(name, 16384, 1), (name, 30000, 1)}
    counts = Counter((chunk.model, chunk.length) for chunk in chunks for _ in range(chunk.count))
    assert counts[name, 4096] == counts[other, 1024] == 11 * 2 * 100


def test_fewer_gpus_have_everything() -> None:
    model = Model(lengths=[1], tasks=["a"], count=1, rates=[0.2], gpus=[1, 2, 3])
    assert (model.placed(4), model.placed(2), model.placed(1)) == ([1, 2, 3], [1, 0], [0])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"count": 0}, "count above 0"),
        ({"rates": [0.3]}, "times.rates lack"),
        ({"rankers": {"rankers": ["claa"], "rates": [0.2], "length": 7, "prompts": 1}}, "rankers.length 7"),
        ({"times": {"tasks": ["b"], "rankers": [], "rates": [0.2]}}, "times.tasks"),
        ({"cuont": 1}, "unknown field `cuont`"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    times = {"tasks": ["a"], "rankers": ["claa"], "rates": [0.2]}
    model = {"lengths": [1], "tasks": ["a"], "count": 1, "rates": [0.2], "gpus": [0], "times": times}
    (tmp_path / "plan.json").write_text(json.dumps({"models": {"m": {**model, **change}}}))
    with pytest.raises(PlanError, match=why):
        plan.load(str(tmp_path / "plan.json"))


def test_what_is_missing_is_said_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "qwen2.5-coder-0.5b"
    model.mkdir()
    (tmp_path / "out" / "raw").mkdir(parents=True)
    command = ["--models", str(model), "--out", str(tmp_path / "out"), "--cpu"]
    assert answers_run.main([*command, "--seconds", "50"]) == answers_run.REFUSED
    said = capsys.readouterr().err
    assert "nothing was started" in said and "no config.json" in said and "no *.safetensors" in said
    assert "--seconds 50" in said and "name another --out" in said
    assert answers_run.main(["--models", "elsewhere", *command[2:], "--seconds", "500"]) == answers_run.REFUSED
    assert "no model 'elsewhere': it has qwen2.5-coder-0.5b, smollm2" in capsys.readouterr().err
    assert answers_run.main([*command, "--seconds", "500", "--plan", "none"]) == answers_run.REFUSED
    assert "known by name: quiet, quiet-wide, qwen, qwen-and-smollm2" in capsys.readouterr().err


def test_a_step_that_eval_quality_would_refuse_is_found() -> None:
    whole = plan.load(plan.DEFAULT)
    (name, model), *_ = whole.models.items()
    wrong = msgspec.structs.replace(model, times=msgspec.structs.replace(model.times, rounds=2))
    with pytest.raises(checks.CheckError, match=r"times30000: .*--rounds: at least 5"):
        checks.commands(msgspec.structs.replace(whole, models={name: wrong}), 4)


def test_a_prompt_keeps_its_form_as_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that cannot be made says why, and stops no other."""

    class Tokenizer:
        def __call__(self, text: str, **more: Any) -> Any:
            return type("Ids", (), {"input_ids": text.split()})

    whole = Prompt(task="t", source="s", length=9, seed=1, prompt="a b c", answers=["1"], answer_prefix=" It is")
    monkeypatch.setattr(prompts, "_tokenizer", lambda path: Tokenizer())
    monkeypatch.setattr(prompts, "token_ids", lambda prompt, tokenizer: [1, 2])
    monkeypatch.setattr(prompts, "make", lambda *args: msgspec.structs.replace(whole, prompt="a", seed=args[4]))
    chunk = prompts.Chunk("m", Path("m"), prompts.ANSWERS, "t", 9, "prefix", "s", 5, 2)
    made = prompts.make_chunk(chunk)
    assert made.error.startswith("ValueError: exactly one of"), "a plain prompt cannot have ids besides"
    monkeypatch.setattr(
        prompts, "make", lambda *args: msgspec.structs.replace(whole, prompt=None, input_ids=[7], seed=args[4])
    )
    made = prompts.make_chunk(chunk)
    assert [(item.entry.form, item.entry.seed) for item in made.items] == [("prefix", 5), ("prefix", 6)]
    again = msgspec.json.decode(made.items[0].line, type=Prompt)
    assert again.input_ids == [1, 2] and again.key == made.items[0].entry.key
    assert "of the form prefix" in prompts.make_chunk(chunk._replace(form="chat")).error
