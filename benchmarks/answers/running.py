"""A run after its checks: servers and prompts side by side, lanes, and what is written at the end in any case."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing import TimeoutError as NotYet
from multiprocessing.pool import Pool
from pathlib import Path
from typing import NamedTuple

from benchmarks.answers import asking, fleet, lanes, prompts, writing
from benchmarks.answers.asking import Asker, Failures, Place
from benchmarks.answers.clock import Clock
from benchmarks.answers.fleet import Wanted
from benchmarks.answers.lanes import Step, Work
from benchmarks.answers.plan import Plan
from benchmarks.answers.prompts import Item
from claa_sglang.tools.servers import Server, ServerFailed

Items = dict[str, dict[str, list[Item]]]  # by model and use
Prepared = tuple[dict[str, Work], dict[str, deque[Step]]]


class Run(NamedTuple):
    """What a run is told. paths: of the models. temp: for prompts; it may be deleted at any time afterwards."""

    plan: Plan
    paths: Mapping[str, Path]
    out: Path
    temp: Path
    gpus: int
    cpu: bool
    command: str


def run(told: Run, clock: Clock, pool: Pool) -> list[str]:
    """What failed, in words. Whatever happens, also an interrupt, OUT has what there is; an interrupt goes on."""
    failures, items = Failures(clock), Items()
    logs = told.out / "logs"
    logs.mkdir(parents=True)
    wanted = fleet.wanted(told.plan, told.paths, told.gpus, told.cpu)
    clock.say(f"{len(wanted)} servers start")
    with ThreadPoolExecutor(len(wanted) + 2 + told.gpus) as threads, fleet.started(wanted, logs, told.cpu) as servers:
        asker = Asker(clock, failures, told.out / "answers", logs, told.temp, told.cpu)
        on_lanes: list[Future[None]] = []
        try:
            ready = {one: threads.submit(_wait, one, servers[one], clock) for one in wanted}
            prepared = threads.submit(_prepare, told, pool, clock, failures, asker, items)
            places = {gpu: found for gpu in range(told.gpus) if (found := _places(gpu, servers, ready))}
            alone = threads.submit(_times_alone, places, told, asker, prepared) if told.plan.quiet else None
            on_lanes += [alone] if alone else []
            for gpu, here in places.items():
                on_lanes.append(threads.submit(_lane, gpu, here, told, asker, prepared, alone))
            _follow([*ready.values(), prepared, *on_lanes], servers, ready, clock, failures)
        except ServerFailed as error:
            failures.add(str(error))
        except Exception as error:  # what was asked before it counts
            failures.add(f"{type(error).__name__}: {error}")
        finally:
            asker.stop()
            wait(on_lanes, timeout=5)
            if on_lanes and prepared.done() and not prepared.exception():
                note_missing(prepared.result()[0], asker.begun, failures)
            writing.write(told, clock, pool, failures, items)
    return failures.found


def _wait(one: Wanted, server: Server, clock: Clock) -> None:
    try:
        server.wait(max(1.0, clock.left_to_ask()))
    except ServerFailed as error:
        raise ServerFailed(f"{one.name}: {str(error).partition('; the end of its log')[0]}", error.log) from None
    clock.say(f"{one.name} is ready")


def _prepare(told: Run, pool: Pool, clock: Clock, failures: Failures, asker: Asker, items: Items) -> Prepared:
    """All prompts, as work. What could not be made is noted and left out."""
    chunks = prompts.chunks(told.plan, told.paths)
    coming, count = pool.imap_unordered(prompts.make_chunk, chunks), 0
    for _ in chunks:
        made = _next(coming, asker)
        if made is None:
            raise RuntimeError(f"asking ended when {count} prompts were made")
        if made.error:
            failures.add(f"{made.chunk}: {made.error}")
        items.setdefault(made.chunk.model, {}).setdefault(made.chunk.use, []).extend(made.items)
        count += len(made.items)
    clock.say(f"{count} prompts are made")
    for uses in items.values():
        for some in uses.values():  # as if made in turn, so that shards do not depend on which process was faster
            some.sort(key=lambda item: (item.entry.task, item.entry.form, item.entry.length, item.entry.seed))
    work = {name: lanes.work(name, model, items.get(name, {}), told.gpus) for name, model in told.plan.models.items()}
    return work, {name: deque(one.shards) for name, one in work.items()}


def _next(coming, asker: Asker) -> prompts.Made | None:
    while not asker.over:
        try:
            return coming.next(0.5)
        except NotYet:
            continue
    return None


def _places(gpu: int, servers: Mapping[Wanted, Server], ready: Mapping[Wanted, Future[None]]) -> list[Place]:
    """Of every model that has a server on this GPU."""
    here = {(one.model, one.stock): one for one in servers if one.gpu == gpu}
    found = []
    for (model, stock), one in here.items():
        if not stock:
            beside = here.get((model, True))
            waited = [ready[each] for each in (one, beside) if each]
            found.append(Place(model, gpu, servers[one], servers[beside] if beside else None, waited))
    return found


def _times_alone(places: Mapping[int, Sequence[Place]], told: Run, asker: Asker, prepared: Future[Prepared]) -> None:
    """All times of the run, with all prompts made, all servers up, and nothing that asks besides."""
    work, _ = prepared.result()
    for here in places.values():  # a server that still starts takes cores of those that are timed
        asking.timed(asker, here, {name: one._replace(times=[]) for name, one in work.items()})
    for gpu, here in places.items():
        asking.timed(asker, here, _of_card(gpu, here, told, work))


def _lane(
    gpu: int,
    places: Sequence[Place],
    told: Run,
    asker: Asker,
    prepared: Future[Prepared],
    alone: Future[None] | None = None,
) -> None:
    """alone: where all times are measured before."""
    work, queues = prepared.result()
    here = _of_card(gpu, places, told, work)
    if alone is not None:
        alone.result()
        here = {name: one._replace(times=[]) for name, one in here.items()}
    asking.lane(asker, places, here, queues)


def _of_card(gpu: int, places: Sequence[Place], told: Run, work: Mapping[str, Work]) -> dict[str, Work]:
    """Of each model here, with the times and special steps that are for this card."""
    here = {}
    for place in places:
        on = told.plan.models[place.model].placed(told.gpus)
        whole = work[place.model]
        here[place.model] = whole._replace(
            times=whole.times if gpu == on[0] else [], special=whole.special if gpu == on[-1] else []
        )
    return here


def note_missing(work: Mapping[str, Work], begun: set[str], failures: Failures) -> None:
    """Steps that were never begun: times, rankers and turns each, shards by their prompts."""
    for name, one in work.items():
        for step in (*one.times, *one.special):
            if step.name not in begun:
                failures.add(f"{step.name}: never begun")
        if left := sum(len(step.items) for step in one.shards if step.name not in begun):
            failures.add(f"{name}: {left} prompts were never asked")


def _follow(
    futures: Sequence[Future],
    servers: Mapping[Wanted, Server],
    ready: Mapping[Wanted, Future[None]],
    clock: Clock,
    failures: Failures,
) -> None:
    """Until all are done or asking is over. Raises the first error. A server that dies later is noted."""
    pending, dead = set(futures), set[Wanted]()
    while pending:
        done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
        for one in done:
            one.result()
        for one, server in servers.items():
            if one not in dead and ready[one].done() and server.process.poll() is not None:
                dead.add(one)
                failures.add(f"{one.name} died: {' | '.join(server.log().splitlines()[-3:])}")
        if pending and clock.left_to_ask() <= 0:
            late = [one.name for one, future in ready.items() if not future.done()]
            if late:
                failures.add(f"not ready when asking ended: {', '.join(late)}")
            clock.say("asking is over")
            return
