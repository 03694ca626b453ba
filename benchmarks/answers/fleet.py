"""The servers of a run: which they are, and all of them started side by side."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.answers.plan import Plan
from claa_sglang.tools import servers
from claa_sglang.tools.cpu_env import cpu_environment
from claa_sglang.tools.servers import Server

# Everything is pruned that a request asks to have pruned, and the plan's flags alone say how.
CLAA = ("--enable-claa", "--claa-policy", "always", "--claa-min-prompt-tokens", "0", "--claa-profile", "none")
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Wanted(NamedTuple):
    """One server. stock: without CLAA."""

    model: str
    gpu: int
    stock: bool
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.model}.{'stock' if self.stock else 'claa'}{self.gpu}"


def wanted(plan: Plan, paths: Mapping[str, Path], gpus: int, cpu: bool) -> list[Wanted]:
    """A CLAA server of each model on each of its GPUs, and stock where it is timed.

    The timed pair has the same flags; the others start faster with `answer_only`.
    """
    found = []
    common = ["--log-level", "warning", *(servers.CPU_FLAGS if cpu else ()), *plan.server]
    for name, model in plan.models.items():
        start = ["--model-path", str(paths[name]), *common]
        for place, gpu in enumerate(model.placed(gpus)):
            timed = model.times is not None and place == 0
            flags = [*start, *([] if timed else plan.answer_only), *CLAA, *model.claa, *_tokens(model.tokens)]
            found.append(Wanted(name, gpu, False, tuple(flags)))
            if timed:
                found.append(Wanted(name, gpu, True, (*start, *_tokens(model.stock_tokens))))
    return found


def _tokens(most: int | None) -> list[str]:
    return [] if most is None else ["--max-total-tokens", str(most)]


def environment(gpu: int, cpu: bool) -> dict[str, str]:
    """Of a server on the gpu-th GPU that this process sees, and of what asks it, which names its card by this."""
    if cpu:
        return {**cpu_environment(), **servers.ONE_THREAD}
    seen = [one for one in os.environ.get(VISIBLE, "").split(",") if one]
    return {VISIBLE: seen[gpu] if seen else str(gpu)}


@contextlib.contextmanager
def started(fleet: Sequence[Wanted], logs: Path, cpu: bool) -> Iterator[dict[Wanted, Server]]:
    """All of them, none of which may answer yet. When the block ends they are gone, and their logs are in `logs`."""
    with contextlib.ExitStack() as running:
        found: dict[Wanted, Server] = {}
        for one in fleet:
            server = None
            while server is None or server.url in {other.url for other in found.values()}:
                if server is not None:  # its port is free only as long as the other has not opened it
                    servers.stop(server.process)
                server = running.enter_context(servers.launched(*one.flags, env=environment(one.gpu, cpu)))
            running.callback(_keep, server, logs / f"{one.name}.log")
            found[one] = server
        try:
            yield found
        finally:
            # Together: one after the other they would take seconds each.
            with ThreadPoolExecutor(len(found) or 1) as threads:
                list(threads.map(servers.stop, [server.process for server in found.values()]))


def _keep(server: Server, log: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.copy(server.log_file, log)
