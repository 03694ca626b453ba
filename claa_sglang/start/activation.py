"""Make a process one that serves CLAA.

Called with the arguments as soon as they are resolved, in the server and in each child. What it leaves behind acts for
servers that serve CLAA only (`patches/gate.py`). The arguments import this in every process that loads plugins, so what
only a start with `--enable-claa` needs is imported inside: of `patches` no more than the table's reader.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from claa_sglang.config.config import ClaaConfig, ConfigError
from claa_sglang.patches import hooks
from claa_sglang.start import startup_time, versions
from claa_sglang.start.server_config import choice_of, is_server_process
from claa_sglang.start.stopping import stop

logger = logging.getLogger(__name__)

# Whether they are imported tells what a process may run.
SCHEDULER = "sglang.srt.managers.scheduler"
ENGINE = "sglang.srt.entrypoints.engine"


def activate(server_args: Any) -> None:
    """Make this process one that serves CLAA: check the arguments and the hooks, apply the hooks, verify them.

    `server_args` are resolved. In the server process all that speaks against starting is collected first, and
    reported together. Idempotent. Stops the server (see `stop`) otherwise.
    """
    with startup_time.counted("hooks"):
        _activate(server_args)


def _activate(server_args: Any) -> None:
    in_server = is_server_process(server_args)
    problems: list[str] = []
    config: ClaaConfig | None = None
    warnings: tuple[str, ...] = ()
    try:
        choice = choice_of(server_args)
        config, warnings = choice.config, choice.warnings
    except ConfigError as error:
        problems.append(str(error))
    if in_server:
        problems += refused(server_args, config)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        stop(server_args, f"--enable-claa cannot be combined with this start ({versions.both()}):\n{listed}")
    try:
        if in_server:
            table = hooks.collect()  # also rows of other processes: they would fail later and less clearly
            if mismatches := hooks.check(table):
                raise hooks.HookError(mismatches)
            if not hooks.applied_count() and (other := hooks.other_version(len(table))):
                logger.warning(other)
        # A child that imported the scheduler may run one (so does the data-parallel controller, which forwards its
        # report); one that imported the engine may start servers. A hook in a process that never calls it is harmless.
        if in_server or ENGINE in sys.modules:
            hooks.apply(hooks.SERVER)
        if not in_server and SCHEDULER in sys.modules:
            hooks.apply(hooks.SCHEDULER)
    except hooks.HookError as error:
        stop(server_args, str(error))
    except Exception as error:  # noqa: BLE001
        stop(server_args, f"the hooks could not be checked: {type(error).__name__}: {error} ({versions.both()})")
    # SGLang resolves a record more than once; its operator is told once.
    if in_server and not getattr(server_args, "_claa_warned", False):
        server_args._claa_warned = True
        for warning in warnings:
            logger.warning(warning)


def refused(server_args: Any, config: ClaaConfig | None) -> list[str]:
    """One line for each rule of `refusals` that these resolved arguments violate; config None: it is refused itself."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

    from claa_sglang.config import refusals
    from claa_sglang.requests.body import wrong_defaults

    arguments, model = resolved_view(server_args), model_config_of(server_args)
    wrong = wrong_defaults(arguments.preferred_sampling_params)
    found = refusals.violated(
        arguments,
        model,
        0 if config is None else config.window,
        wrong_defaults=wrong,
        decodes_over_kept=config is not None and bool(config.kept_layers),
        observes=config is not None and config.observes,
        explains=config is not None and config.allow_explain,
        shadows=config is not None and config.shadow_rate > 0,
    )
    return [str(rule) for rule in found]
