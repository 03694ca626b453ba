"""One run: which engines live when, the rounds they serve, and the file that grows with them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from benchmarks.ttft import record, setup
from benchmarks.ttft.catalogue import SCENARIOS
from benchmarks.ttft.engines import EngineProcess
from benchmarks.ttft.record import Record
from benchmarks.ttft.scenarios import Lab, Samples
from benchmarks.ttft.settings import Settings
from benchmarks.ttft.setup import Model

SHUTDOWN_SECONDS = 15  # kept of the budget, to stop the engines in


class OutOfTime(Exception):
    """The budget would not hold another round."""


class Budget:
    """Seconds that the run may take, from now; None: any number."""

    def __init__(self, seconds: float | None):
        self._started = time.monotonic()
        self._seconds = seconds

    @property
    def used(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._started

    def check(self, expected: float) -> None:
        """Raise OutOfTime unless `expected` seconds are left."""
        if self._seconds is not None and self.used + expected + SHUTDOWN_SECONDS > self._seconds:
            raise OutOfTime(
                f"{self.used:.0f} of {self._seconds:.0f} s were used and the next round would take {expected:.0f} s"
            )


class How(msgspec.Struct, frozen=True, kw_only=True):
    """one_at_a_time: one engine lives at a time. start_in_turn: engines start one after another, not all together.
    engines: names of those to start; None: all that the scenarios need. control: a second stock engine as well.
    """

    gpu: bool
    one_at_a_time: bool
    start_in_turn: bool
    log_level: str
    engines: list[str] | None = None
    control: bool = False


class Run:
    """Measures into `result`, which is written to `out` after every round."""

    def __init__(self, model: Model, settings: Settings, how: How, budget: Budget, result: Record, out: Path):
        self.model, self.settings, self.how = model, settings, how
        self.budget, self.result, self.out = budget, result, out

    def save(self) -> None:
        """Write what there is."""
        record.save(self.result, self.out)

    def engine_options(self, scenarios: list[str], chunk: int) -> dict[str, dict[str, Any]]:
        """Options of each engine that `scenarios` need, by name."""
        options = setup.engine_options(self.model, self.settings, chunk, scenarios, self.how.gpu)
        if self.how.control:
            options["again"] = options["stock"]
        named = self.how.engines or list(options)
        return {name: {**own, "log_level": self.how.log_level} for name, own in options.items() if name in named}

    def scenarios(self, names: list[str], chunk: int) -> None:
        """Measure the scenarios `names`, of SCENARIOS, with engines of this chunk size. Raises OutOfTime."""
        options = self.engine_options(names, chunk)
        shared = same_model(options.get("late"), options.get("early"))
        if shared:
            del options["late"]  # `early` serves whole prompts: it is the larger
        for group in [[name] for name in options] if self.how.one_at_a_time else [list(options)]:
            with contextlib.ExitStack() as stack:
                engines = self._start({name: options[name] for name in group}, stack)
                if shared and "early" in engines:
                    engines["late"] = engines["early"]
                lab = Lab(engines, self.settings, self.model.config["vocab_size"])
                for name in names:
                    scenario = SCENARIOS[name]
                    if set(scenario.engines) & set(engines):
                        for tokens in scenario.points(self.settings):
                            self.rounds(name, tokens, chunk, partial(lab.serve, scenario.round, tokens))

    def rounds(self, scenario: str, tokens: int, chunk: int, once: Callable[[int], Samples]) -> None:
        """Warm up, then time: `once` gets the index of the round. A round is on record as a whole or not at all.

        Where a round fails, that is put on record and the point is left: what else the run was to measure still counts.
        """
        known, took = SCENARIOS.get(scenario), 0.0
        warm, timed = self.settings.warm_rounds, self.settings.rounds
        if known is not None and known.long:
            warm, timed = 0, self.settings.long_rounds
        bar = tqdm(range(warm + timed), desc=f"{scenario}, {tokens} tokens", unit="round")
        for index in bar:
            self.budget.check(took)
            started = self.budget.used
            try:
                samples = once(index)
            except RuntimeError as error:
                self.result.errors.append(f"{scenario}, {tokens} tokens, chunk {chunk}, round {index}: {error}")
                self.save()
                return
            took = self.budget.used - started
            if index >= warm:
                self.result.add({"scenario": scenario, "tokens": tokens, "chunk": chunk}, samples)
                self.save()

    def _start(self, options: dict[str, dict[str, Any]], stack: contextlib.ExitStack) -> dict[str, EngineProcess]:
        """Start engines, all together unless told otherwise, and wait for them."""
        engines: dict[str, EngineProcess] = {}
        with tqdm(total=len(options), desc="starting engines", unit="engine") as bar:
            for name, own in options.items():
                engines[name] = EngineProcess(own)
                stack.callback(engines[name].stop)
                if self.how.start_in_turn:
                    engines[name].wait()
            for name, engine in engines.items():
                if not self.how.start_in_turn:
                    engine.wait()
                self._started(name, engine)
                bar.update()
        return engines

    def _started(self, name: str, engine: EngineProcess) -> None:
        """Put it on record. Raises RuntimeError where it got less memory than it needs."""
        info = engine.info()
        size, wanted = info["max_total_num_tokens"], engine.options["max_total_tokens"]
        if size < wanted:
            raise RuntimeError(
                f"engine {name} has room for {size} tokens of KV, {wanted} are needed: leave out long or wide "
                "scenarios, or give --one-at-a-time"
            )
        if name == "claa":
            self.result.claa = info["claa"]
        # Paths belong to the machine, not to the result.
        options = {key: value for key, value in engine.options.items() if key != "model_path"}
        backend = info["attention_backend"]
        self.result.engines.append(
            {"name": name, "seconds": engine.seconds, "attention_backend": backend, "options": options}
        )
        self.save()


def same_model(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two engines, both there, differ in nothing but the size of their KV."""
    return bool(one and other) and one | {"max_total_tokens": 0} == other | {"max_total_tokens": 0}  # type: ignore[operator]
