"""Would a server start with these flags: SGLang's own arguments, CLAA's configuration, what cannot be combined."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from claa_sglang.arguments import ENABLE, FIELDS, from_command_line, with_flags, without_flags
from claa_sglang.config.config import ClaaConfig, ConfigError
from claa_sglang.config.profile_choice import Choice, choose
from claa_sglang.doctor.finding import Finding
from claa_sglang.start.activation import refused
from claa_sglang.start.server_config import context_length, flags_of, model_of

FLAG = "--" + ENABLE.replace("_", "-")
INT32 = 4  # bytes of an entry of the request table


@dataclass(frozen=True)
class Start:
    """A start as far as it goes without weights.

    record: SGLang's resolved arguments. choice: CLAA's configuration, or what is wrong with its flags. refused: what
    cannot be combined, a line each.
    """

    record: Any
    choice: Choice | ConfigError
    refused: tuple[str, ...]

    @property
    def config(self) -> ClaaConfig | None:
        """The configuration, where the flags make one."""
        return None if isinstance(self.choice, ConfigError) else self.choice.config


def try_start(words: Sequence[str]) -> Start:
    """Read and resolve a server's command line, weights apart. `--enable-claa` is understood.

    Raises what SGLang raises: SystemExit of its parser, and errors of a model whose configuration cannot be read.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given = from_command_line([*words, *([] if FLAG in words else [FLAG])])
    except SystemExit as error:
        lines = said.getvalue().strip().splitlines()
        raise SystemExit(lines[-1] if lines and isinstance(error.code, int) else str(error)) from error
    stock = without_flags(given)
    stock.resolve_once()
    # Resolved without CLAA, as else it would start to serve here, or stop at the first thing that is wrong.
    record = with_flags(stock, {name: getattr(given, name) for name in FIELDS})
    choice: Choice | ConfigError
    try:
        choice = choose(flags_of(record), model_of(record))
    except ConfigError as error:
        choice = error
    config = None if isinstance(choice, ConfigError) else choice.config
    return Start(record, choice, tuple(refused(record, config)))


def configuration(start: Start) -> Finding:
    """CLAA's own flags and its profile."""
    if isinstance(start.choice, ConfigError):
        return Finding("configuration", False, str(start.choice))
    config = start.choice.config
    steps = ", ".join(f"keep {step.keep_rate:g} after layer {step.prune_layer}" for step in config.steps)
    text = f"{steps} of {config.num_layers} layers; profile {config.profile or 'none'} ({config.profile_origin})"
    return Finding("configuration", True, text, start.choice.warnings)


def combination(start: Start) -> Finding:
    """What of the flags, and of the model, cannot be combined with CLAA."""
    if start.refused:
        return Finding("flags and model", False, f"{len(start.refused)} of them cannot be combined", start.refused)
    return Finding("flags and model", True, "nothing that cannot be combined with --enable-claa")


def memory(start: Start) -> Finding:
    """What late rows of the request table take, which --mem-fraction-static counts."""
    config = start.config
    if config is None:
        return Finding("memory", None, "not known before the configuration is")
    per_request = config.row_kinds * context_length(start.record) * INT32
    running = start.record.max_running_requests
    total = "" if not running else f", {(running + 1) * per_request / 2**20:.0f} MiB for {running}"
    text = f"late rows take {per_request / 2**10:.0f} KiB for each running request{total}"
    return Finding("memory", None, text)
