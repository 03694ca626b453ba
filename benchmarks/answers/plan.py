"""What a run asks of which model: a JSON file, or one of `PLANS`.

    {"models": {"my-model": {"lengths": [1024], "tasks": ["needle-uuid"], "count": 100, "rates": [0.2],
                             "gpus": [0], "claa": ["--claa-prune-layer", "10"]}}}

A model is found by the name of its directory. What is left out has the value below.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from claa_sglang.tasks.record import CHAT, PREFIX

NAMED = Path(__file__).resolve().parent / "plans"
DEFAULT = "qwen-and-smollm2"


class PlanError(ValueError):
    """The plan cannot be used; the message says what to change."""


class Times(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TTFT beside stock, and kept sets, of one model on one card with nothing else.

    tasks, prompts: so many of each task, form and length. rounds: timed ones. kept_sets: prompts per length.
    lengths: those of the model if there are none; others are timed only, and no answer of theirs is counted.
    """

    rankers: list[str]
    rates: list[float]
    tasks: list[str]
    prompts: int = 2
    lengths: list[int] = []
    rounds: int = 5
    kept_sets: int = 4


class Rankers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Several rankers on the last prompts of one length. prompts: of each task and form."""

    rankers: list[str]
    rates: list[float]
    length: int
    prompts: int


class Turns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Chats of several questions, by the server's own ranker. count: of each task and length."""

    tasks: list[str]
    lengths: list[int]
    rates: list[float]
    count: int
    turns: int = 3
    seed: int = 30_000


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked of one model.

    count: prompts of each task, length and form. claa: flags of its CLAA servers. tokens, stock_tokens:
    --max-total-tokens of a CLAA server and of stock, as several servers share a GPU; None leaves it to SGLang.
    gpus: those it has a CLAA server on, modulo the number there is; the first times, the last asks rankers and turns.
    in_flight: requests at a time, of each server. times, rankers, turns: left out if not there.
    """

    lengths: list[int]
    tasks: list[str]
    count: int
    rates: list[float]
    gpus: list[int]
    seed: int = 20_000
    claa: list[str] = []
    tokens: int | None = None
    stock_tokens: int | None = None
    in_flight: int = 32
    times: Times | None = None
    rankers: Rankers | None = None
    turns: Turns | None = None

    @property
    def only_timed(self) -> list[int]:
        """Lengths that are timed and not among those that are asked."""
        return [length for length in self.times.lengths if length not in self.lengths] if self.times else []

    def placed(self, gpus: int) -> list[int]:
        """Its GPUs, where there are so many."""
        return list(dict.fromkeys(gpu % gpus for gpu in self.gpus))


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run. models: by name of the directory.

    sources: text of each form of prompt. server: flags of all servers. answer_only: of those that are not timed.
    finish: seconds before the deadline at which asking ends, for merging and counting.
    quiet: all servers are up and all times are measured, one model after the other, before anything else is asked.
        Else only the card that is timed is left alone, and other cards answer meanwhile.
    """

    models: dict[str, Model]
    sources: dict[str, str] = msgspec.field(default_factory=lambda: {PREFIX: "prose", CHAT: "sentences"})
    server: list[str] = []
    answer_only: list[str] = []
    finish: float = 45
    quiet: bool = False


def load(name: str) -> Plan:
    """A file, or the name of one in `plans`. Raises PlanError."""
    path = next((path for path in (NAMED / f"{name}.json", Path(name)) if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(path.stem for path in NAMED.glob("*.json")))
        raise PlanError(f"--plan {name!r}: no such file; known by name: {known}")
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=Plan)
    except msgspec.DecodeError as error:
        raise PlanError(f"{path}: {error}") from error
    for name, model in plan.models.items():
        _check(name, model)
    if not plan.models or not set(plan.sources) <= {PREFIX, CHAT} or not plan.sources:
        raise PlanError(f"{path}: needs at least one of models, and sources of {PREFIX}, {CHAT} or both")
    return plan


def _check(name: str, model: Model) -> None:
    if not (model.lengths and model.tasks and model.rates and model.gpus and model.count > 0):
        raise PlanError(f"{name}: needs lengths, tasks, rates, gpus and a count above 0")
    if model.times:
        if not set(model.times.tasks) <= set(model.tasks):
            raise PlanError(f"{name}: times.tasks are not all among its tasks")
        asked = {*model.rates, *(model.rankers.rates if model.rankers else [])}
        if not asked <= set(model.times.rates):
            raise PlanError(f"{name}: times.rates lack some that are asked, which the figure could not show")
    if model.rankers and model.rankers.length not in model.lengths:
        raise PlanError(f"{name}: rankers.length {model.rankers.length} is not among its lengths")
