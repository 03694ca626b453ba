"""Steps as processes of `benchmarks.eval_quality`, on lanes: a lane is a card with its servers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.answers import fleet, lanes
from benchmarks.answers.clock import Clock
from benchmarks.answers.lanes import Step, Work
from claa_sglang.tools import servers
from claa_sglang.tools.servers import Server

ROOT = Path(__file__).resolve().parents[2]
LAST = 3.0  # seconds for requests in flight when a step is to begin no more


class Place(NamedTuple):
    """Where a model is asked on one card. stock: where it is timed. ready: done, or failed, with their start."""

    model: str
    gpu: int
    claa: Server
    stock: Server | None
    ready: Sequence[Future[None]]

    @property
    def alive(self) -> bool:
        return all(server.process.poll() is None for server in (self.claa, self.stock) if server)


class Failures:
    """What went wrong, for the record."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.found: list[str] = []

    def add(self, what: str) -> None:
        self.found.append(what if len(what) < 1000 else f"{what[:200]} … {what[-800:]}")
        self.clock.say(f"FAILED: {what}")


class Asker:
    """Runs steps. answers, logs: folders for what they write; prompts lie in `temp` while they run."""

    def __init__(self, clock: Clock, failures: Failures, answers: Path, logs: Path, temp: Path, cpu: bool):
        self._clock, self._failures, self._cpu = clock, failures, cpu
        self._answers, self._logs, self._temp = answers, logs, temp
        self._stopped = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.begun: set[str] = set()  # names of steps

    def stop(self) -> None:
        """End what runs; nothing is begun any more."""
        self._stopped.set()
        for process in list(self._running):
            servers.stop(process)

    @property
    def over(self) -> bool:
        return self._stopped.is_set() or self._clock.left_to_ask() < LAST

    def run(self, step: Step, place: Place) -> bool:
        """One step to its end, or to the end of asking; whether it came to its end. A failure is noted, not raised.

        A step that fails is tried once more: it goes on where it was, as its answers are kept.
        """
        for again in (True, False):
            if self.over or not place.alive:
                return False
            self.begun.add(step.name)
            status, seconds, log = self._once(step, place)
            if status == 0:
                self._clock.say(f"{step.name}: {len(step.items)} prompts, {seconds:.1f} s")
                return True
            self._failed(step, status, seconds, log, again and place.alive)
        return False

    def _once(self, step: Step, place: Place) -> tuple[int, float, Path]:
        """Exit status, seconds and log."""
        began, log = self._clock.passed, self._logs / f"{step.name}.log"
        with tempfile.TemporaryDirectory(dir=self._temp) as home, log.open("ab") as output:
            prompts = Path(home, "prompts.jsonl")
            prompts.write_bytes(b"".join(item.line + b"\n" for item in step.items))
            seconds = self._clock.left_to_ask() - LAST
            words = lanes.command(step, prompts, self._answers / place.model, *_urls(place), seconds)
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.eval_quality", *words],
                cwd=ROOT,
                env={**os.environ, **fleet.environment(place.gpu, self._cpu)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
            try:
                if self._stopped.is_set():
                    servers.stop(process)
                process.wait(max(0.0, self._clock.left_to_ask()))
            except subprocess.TimeoutExpired:
                servers.stop(process)
            finally:
                self._running.discard(process)
        return process.returncode, self._clock.passed - began, log

    def _failed(self, step: Step, status: int, seconds: float, log: Path, again: bool) -> None:
        if self.over:
            self._clock.say(f"{step.name}: cut short after {seconds:.1f} s; what was answered counts")
            if step.stock:
                self._failures.add(f"{step.name}: cut short, so its times are missing")
            return
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        why = f"{step.name}: exit status {status}: {lines[-1][:300]}; see logs/{log.name}"
        if again:
            self._clock.say(f"{why}; once more")
        else:
            self._failures.add(why)


def _urls(place: Place) -> tuple[str, str | None]:
    return place.claa.url, place.stock.url if place.stock else None


def lane(asker: Asker, places: Sequence[Place], work: Mapping[str, Work], queues: Mapping[str, deque[Step]]) -> None:
    """Everything on one card: times alone, then all models side by side.

    Where all times were measured before (`timed`), `work` has none.

    places, work: of each model on this card, with the times and special steps that are for this card. queues: of each
    model, shared with its other cards. Raises ServerFailed if a server of the card did not start.
    """
    timed(asker, places, work)
    side_by_side([partial(_model, asker, place, work[place.model], queues[place.model]) for place in places])


def timed(asker: Asker, places: Sequence[Place], work: Mapping[str, Work]) -> None:
    """Once every server of these places is ready, what is to be timed on each of them, one after the other.

    Raises ServerFailed if one of the servers did not start.
    """
    for place in places:
        for one in place.ready:
            _await(one, asker)
    for place in places:
        _in_order(asker, place, work[place.model].times)


def _await(ready: Future[None], asker: Asker) -> None:
    while not asker.over:
        with contextlib.suppress(TimeoutError):
            return ready.result(0.5)


def _in_order(asker: Asker, place: Place, steps: Sequence[Step]) -> None:
    for step in steps:
        asker.run(step, place)


def _model(asker: Asker, place: Place, work: Work, queue: deque[Step]) -> None:
    _in_order(asker, place, work.special)
    side_by_side([partial(_take, asker, place, queue)] * lanes.ASKING)


def _take(asker: Asker, place: Place, queue: deque[Step]) -> None:
    """Shards until there are no more. A card whose server has died gives its shard back and takes no other."""
    while place.alive and not asker.over:
        try:
            step = queue.popleft()
        except IndexError:
            return
        if not asker.run(step, place) and not place.alive:
            queue.appendleft(step)


def side_by_side(calls: Sequence[Callable[[], None]]) -> None:
    """In threads; raises the first error once all have ended."""
    with ThreadPoolExecutor(len(calls)) as threads:
        for one in [threads.submit(call) for call in calls]:
            one.result()
