"""Where SGLang's arguments learn the flags: the parser, what it makes, `Engine(...)` and configuration files.

These rows are in place in every process that loads plugins, with `--enable-claa` or without, so each does nothing
unless CLAA is asked for: a record without our flags is SGLang's own, of SGLang's own class.
"""

from __future__ import annotations

import sys
from typing import Any

import sglang.srt.server_args as sglang_arguments
from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass

from claa_sglang.arguments import ENABLE, FIELDS, ClaaServerArgs, asked_for, with_flags
from claa_sglang.config.config import ConfigError
from claa_sglang.config.flags import HELP, from_config_file
from claa_sglang.patches.hooks import ALWAYS, Hook, Mismatch, check
from claa_sglang.start.activation import ENGINE
from claa_sglang.start.stopping import stop


def add_flags(_result: None, *given: Any) -> None:
    """AFTER ServerArgs.add_cli_args: our flags too, whichever class stands for ServerArgs."""
    parser = given[-1]
    if "--enable-claa" not in parser._option_string_actions:
        add_cli_args_from_dataclass(parser, ClaaServerArgs, fields=list(FIELDS))


def take_flags(record: Any, *given: Any) -> Any:
    """AFTER ServerArgs.from_cli_args: the record with our flags where one was given, else SGLang's as it is."""
    values = vars(given[-1])
    if ENABLE in type(record).__struct_fields__ or not asked_for(values):
        return record
    return _extended(record, values)


def refuse_attributes(record: Any) -> None:
    """BEFORE ServerArgs.resolve_once: a flag set as an attribute of SGLang's own record would be ignored."""
    if given := asked_for(vars(record)):
        values = ", ".join(f"{name}={value!r}" for name, value in given.items())
        stop(
            record,
            f"{values} set on SGLang's own ServerArgs, which knows no such field. Make the arguments with "
            f"claa_sglang.arguments.ClaaServerArgs(..., {values}), or start sglang.Engine(..., {values})",
        )


class EngineArguments:
    """What `Engine.server_args_class` is where an engine calls it; `Engine` itself shows SGLang's class, as before.

    held: what was there, SGLang's class or another plugin's.
    """

    def __init__(self, held: Any):
        self.held = held

    def __get__(self, engine: Any, owner: type) -> Any:
        return self.held if engine is None else self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.held, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        if not asked_for(values):
            return self.held(*args, **kwargs)
        # Engine's attribute was bound when its module was imported; another plugin may have replaced the class since.
        is_own = self.held is ClaaServerArgs.__mro__[1]
        return _extended((sglang_arguments.ServerArgs if is_own else self.held)(*args, **kwargs), values)


def equip_engine(*_: Any) -> None:
    """AFTER load_plugins, which every Engine calls first, and after hooks are applied: `Engine(enable_claa=True)`."""
    engine = getattr(sys.modules.get(ENGINE), "Engine", None)
    for cls in getattr(engine, "__mro__", ()):
        held = vars(cls).get("server_args_class")
        if held is not None:
            if not isinstance(held, EngineArguments):
                cls.server_args_class = EngineArguments(held)
            return


def read_config(values: dict[Any, Any], merger: Any, file_path: str) -> dict[Any, Any]:
    """AFTER ConfigArgumentMerger._parse_yaml_config: our flags as they are written on a command line.

    SGLang hands a list on as several words, so one of one item would arrive as a count.
    """
    read = {}
    for key, value in values.items():
        name = str(key).replace("-", "_").removeprefix("claa_")
        if str(key).startswith("claa") and name in HELP:
            try:
                value = from_config_file(name, value)
            except ConfigError as error:
                merger.parser.error(f"claa-sglang: {file_path}: {error}")
        read[key] = value
    return read


def _extended(record: Any, values: dict[str, Any]) -> Any:
    """`with_flags`, or a stop that names whose class stands in the way."""
    try:
        return with_flags(record, values)
    except TypeError as error:
        cls = type(record)
        stop(
            record,
            f"--enable-claa: SGLang's ServerArgs is {cls.__module__}.{cls.__qualname__}{_plugin_of(cls)} here, which "
            f"cannot be extended with the CLAA flags: {error}. Remove that plugin, or load this one alone: "
            "SGLANG_PLUGINS=claa",
        )


def _plugin_of(cls: type) -> str:
    from sglang.srt.plugins.hook_registry import HookRegistry, _format_source

    sources = [source for entries in HookRegistry._hooks.values() for _, hook, source in entries if hook is cls]
    return f" ({_format_source(sources[-1])})" if sources else ""


def mismatches() -> list[Mismatch]:
    """Rows that the installed SGLang does not fit; not of a class that another plugin put in place of ServerArgs."""
    replaced = sglang_arguments.ServerArgs is not ClaaServerArgs.__mro__[1]
    return check(row for row in ARGUMENT_HOOKS if not (replaced and row.target.startswith(_ARGUMENTS)))


_ARGUMENTS = "sglang.srt.server_args.ServerArgs"

ARGUMENT_HOOKS: tuple[Hook, ...] = (
    Hook(
        f"{_ARGUMENTS}.add_cli_args",
        ("parser",),
        "after",
        add_flags,
        ALWAYS,
        "The flags, beside SGLang's and those of other plugins.",
    ),
    Hook(
        f"{_ARGUMENTS}.from_cli_args",
        ("cls", "args"),
        "after",
        take_flags,
        ALWAYS,
        "Arguments that ask for CLAA become a ClaaServerArgs, others stay SGLang's own.",
    ),
    Hook(
        f"{_ARGUMENTS}.resolve_once",
        ("self",),
        "before",
        refuse_attributes,
        ALWAYS,
        "A flag set on SGLang's own record, which would ignore it, is refused.",
    ),
    Hook(
        "sglang.srt.plugins.load_plugins",
        (),
        "after",
        equip_engine,
        ALWAYS,
        "An engine that was imported since then accepts the flags: `Engine.server_args_class` as its instances see it.",
    ),
    Hook(
        "sglang.srt.utils.server_args_config_parser.ConfigArgumentMerger._parse_yaml_config",
        ("self", "file_path"),
        "after",
        read_config,
        ALWAYS,
        "A list in a configuration file stays a list, and a value that YAML read as another is refused.",
    ),
)
