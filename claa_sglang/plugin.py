"""What SGLang loads: the flags always, everything else only once `--enable-claa` is known to be given.

`register` runs in every SGLang process before arguments exist, so all it may do is make the flags known. The rest
happens in `activate`, which the arguments call as soon as they are resolved, in the server and in each child.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, NoReturn

from claa_sglang import startup_time

logger = logging.getLogger(__name__)

ENGINE = "sglang.srt.entrypoints.engine"
SCHEDULER = "sglang.srt.managers.scheduler"


class StartupError(RuntimeError):
    """`--enable-claa` cannot work as asked; the text has every reason, each with a remedy."""


def register() -> None:
    """Entry point `sglang.srt.plugins`: make SGLang's ServerArgs know the flags; touch nothing else.

    If it fails, SGLang logs it and goes on without the flags, so `--enable-claa` ends in "unrecognized arguments".
    """
    try:
        with startup_time.counted("flags"):
            _register()
    except Exception as error:
        logger.error("claa-sglang could not load, so SGLang will not know --enable-claa: %r", error)
        raise


def _register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from claa_sglang.arguments import ClaaServerArgs

    HookRegistry.register("sglang.srt.server_args.ServerArgs", ClaaServerArgs, HookType.REPLACE)
    if ENGINE in sys.modules:
        # The class attribute was bound when the module was imported; a later import finds ours.
        HookRegistry.register(f"{ENGINE}.Engine.server_args_class", ClaaServerArgs, HookType.REPLACE)


def activate(server_args: Any) -> None:
    """Make this process one that serves CLAA: check the arguments and the hooks, apply the hooks, verify them.

    `server_args` are resolved. In the server process all that speaks against starting is collected first, and
    reported together. Idempotent. Stops the server (see `stop`) otherwise.
    """
    with startup_time.counted("hooks"):
        _activate(server_args)


def _activate(server_args: Any) -> None:
    from claa_sglang.arguments import config_of, is_server_process
    from claa_sglang.config.config import ConfigError
    from claa_sglang.patches import hooks

    in_server = is_server_process(server_args)
    problems: list[str] = []
    window = 0
    try:
        window = config_of(server_args).window
    except ConfigError as error:
        problems.append(str(error))
    if in_server:
        problems += refused(server_args, window)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        stop(server_args, f"--enable-claa cannot be combined with this start ({_versions()}):\n{listed}")
    try:
        if in_server and (mismatches := hooks.check(hooks.collect())):
            raise hooks.HookError(mismatches)  # also rows of other processes: they would fail later and less clearly
        # A child that imported the scheduler may run one (so does the data-parallel controller, which forwards its
        # report); one that imported the engine may start servers. A hook in a process that never calls it is harmless.
        if in_server or ENGINE in sys.modules:
            hooks.apply(hooks.SERVER)
        if not in_server and SCHEDULER in sys.modules:
            hooks.apply(hooks.SCHEDULER)
    except hooks.HookError as error:
        stop(server_args, str(error))
    except Exception as error:  # noqa: BLE001
        stop(server_args, f"the hooks could not be checked: {type(error).__name__}: {error} ({_versions()})")


def refused(server_args: Any, window: int) -> list[str]:
    """One line for each rule of `refusals` that these resolved arguments violate; `window` in tokens, 0 if unknown."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

    from claa_sglang.config import refusals

    arguments, model = resolved_view(server_args), model_config_of(server_args)
    return [str(rule) for rule in refusals.violated(arguments, model, window)]


def stop(server_args: Any, text: str) -> NoReturn:
    """Stop the start with `text`: StartupError in Python, a clean exit from the command line or in a child process."""
    text = f"claa-sglang: {text}"
    command = getattr(server_args, "launch_command", None)
    from_python = command is None or str(command).startswith("Engine(")
    # SGLang runs servers from Python too, where ending the interpreter is not ours to decide.
    if from_python and getattr(server_args, "_claa_server_pid", os.getpid()) == os.getpid():
        raise StartupError(text)
    raise SystemExit(text)


def _versions() -> str:
    from claa_sglang.patches.hooks import _version

    return f"claa-sglang {_version('claa-sglang')}, sglang {_version('sglang')}"
