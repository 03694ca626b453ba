"""Every scheduler tells the server that it serves CLAA and how; a server whose schedulers do not does not start.

The parent has checked itself, but a scheduler is another process, where an environment variable, another plugin or
another installation can make things different. SGLang's own handshake carries the proof: what a scheduler sends when
it is ready has a `claa` entry, and the parent compares it with its own configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from claa_sglang.patches import attached
from claa_sglang.patches.hooks import SCHEDULER, SERVER, Hook, applied_count
from claa_sglang.start import startup_time
from claa_sglang.start.server_config import config_of
from claa_sglang.start.stopping import stop

REMEDY = (
    "Start all processes from one installation of claa-sglang, and see the scheduler's log above for why its hooks "
    "are not in place."
)


def report_active(result: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """AFTER Scheduler.get_init_info: adds `claa` to the handshake of a scheduler whose hooks are verified."""
    choice = attached.scorer.find(scheduler.req_to_token_pool)
    return {**result, "claa": {**state_of(scheduler.server_args), "scorer": choice and choice._asdict()}}


def state_of(server_args: Any) -> dict[str, Any]:
    """What this process serves: `config` (plain JSON), `hooks`, the number of rows applied and verified here, and
    `startup_seconds`, what that has taken, by part."""
    return {
        "config": config_of(server_args).to_dict(),
        "hooks": applied_count(),
        "startup_seconds": startup_time.parts(),
    }


def report_of_replicas(result: dict[str, Any], controller: Any) -> dict[str, Any]:
    """AFTER DataParallelController.get_init_info: hands on what every replica reports, in `replicas`.

    The first one's stands for all of them in what the server shows.
    """
    reports = [info.get("claa") or {} for info in controller._scheduler_init_infos]
    return {**result, "claa": {**reports[0], "replicas": reports}}


def require_active(
    original: Callable[..., list[dict[str, Any]]], scheduler_pipe_readers: list[Any], scheduler_procs: list[Any]
) -> list[dict[str, Any]]:
    """AROUND _wait_for_scheduler_ready in the server: stops it unless every scheduler serves our configuration."""
    from sglang.srt.runtime_context import get_context

    server_args = get_context().server_args
    try:
        infos = original(scheduler_pipe_readers, scheduler_procs)
        expected = config_of(server_args).to_dict()
        reports = [info.get("claa") or {} for info in infos]
        each = [one for report in reports for one in report.get("replicas", [report])]
        for rank, found in enumerate(each):
            if found.get("config") != expected or not found.get("hooks"):
                _refuse(server_args, rank, expected, found, scheduler_procs)
    except BaseException:
        _keep_sockets()
        raise
    return infos


def _refuse(
    server_args: Any, rank: int, expected: dict[str, Any], found: dict[str, Any], processes: list[Any]
) -> NoReturn:
    from sglang.srt.utils import kill_process_tree

    for process in processes:
        kill_process_tree(process.pid)
    stop(
        server_args,
        f"scheduler {rank} does not serve CLAA as this server was asked to.\n"
        f"      expected: its hooks verified, config {expected}\n"
        f"      found:    {found or 'no report: CLAA is not active there'}\n  {REMEDY}",
    )


_kept: list[Any] = []


def _keep_sockets() -> None:
    """Keep the ZeroMQ contexts of the server that does not start from being collected.

    A context collected together with its sockets waits for them for ever: a refusal would end in a process that
    hangs when it leaves, or in a caller of sgl.Engine that hangs in its next garbage collection.
    """
    import gc

    import zmq

    _kept.extend(held for held in gc.get_objects() if isinstance(held, zmq.Context))


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_init_info",
        ("self",),
        "after",
        report_active,
        SCHEDULER,
        "Tells the server, in SGLang's own handshake, that this scheduler serves CLAA and with which configuration.",
    ),
    Hook(
        "sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info",
        ("self",),
        "after",
        report_of_replicas,
        SCHEDULER,
        "The controller answers for its replicas and would drop their report.",
    ),
    Hook(
        "sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
        ("scheduler_pipe_readers", "scheduler_procs"),
        "around",
        require_active,
        SERVER,
        "Stops the server unless every scheduler reports the configuration that the server was given.",
    ),
)
