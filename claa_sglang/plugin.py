"""What SGLang loads: the flags always, everything else only once `--enable-claa` is known to be given.

`register` runs in every SGLang process before arguments exist, so all it may do is make the flags known. The rest
happens in `start/activation.py`, which the arguments call as soon as they are resolved.
"""

from __future__ import annotations

import logging

from claa_sglang.start import startup_time

logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point `sglang.srt.plugins`: make SGLang know the flags; touch nothing else.

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

    from claa_sglang.patches import arguments, hooks

    if mismatches := arguments.mismatches():
        raise hooks.HookError(mismatches)
    for hook in arguments.ARGUMENT_HOOKS:
        HookRegistry.register(hook.target, hook.fn, HookType(hook.kind))
    applies = HookRegistry.apply_hooks

    def apply_hooks() -> None:
        """As SGLang does; then the engine gets the flags on top of what any plugin, loaded before or after, did to it.

        The engine that loads plugins goes on to make its arguments right after this.
        """
        applies()
        arguments.equip_engine()

    HookRegistry.apply_hooks = staticmethod(apply_hooks)
