"""`--enable-claa` and the `--claa-*` flags: a subclass of SGLang's ServerArgs that also refuses to be ignored.

Only what asks for CLAA gets this record. SGLang's own class stays where it is and as it is, so arguments that were
made before plugins load, pickles, subclasses and what other plugins do to the class are as without us;
`patches/arguments.py` is where flags meet it.

SGLang unpickles the record in its child processes before it loads plugins, so this module imports on its own and
the class is a module attribute. No module global may hold SGLang's class: the hook registry rewrites every one that
holds a class that some plugin replaces.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import msgspec
import sglang.srt.server_args as sglang_arguments
from sglang.srt.arg_groups.arg_utils import A, Arg

from claa_sglang.config.flags import HELP, ClaaFlags
from claa_sglang.start.activation import activate
from claa_sglang.start.stopping import stop

ENABLE_HELP = (
    "Serve long prompts through CLAA: layers after the prune layer see only the prompt tokens that matter. Every "
    "process checks that it can, or the server does not start (default off). A request can override it with "
    'custom_params {"claa": {...}}.'
)
ENABLE = "enable_claa"
FIELDS = (ENABLE, *(f"claa_{name}" for name in HELP))
NAMESPACE = "claa"  # of SGLang's configuration tree, where it files the fields


def _build(base: type) -> type:
    """`base`, which is SGLang's ServerArgs or another plugin's subclass of it, with the CLAA fields."""
    types = get_type_hints(ClaaFlags)
    fields: list[tuple[str, Any, Any]] = [(ENABLE, A[bool, Arg(help=ENABLE_HELP)], False)]
    for name, text in HELP.items():
        fields.append((f"claa_{name}", A[types[name], Arg(help=f"{text}. Needs --enable-claa.")], None))

    def resolve_once(self: Any) -> None:
        """Resolve as SGLang does, then make this process one that serves CLAA, or raise.

        Every process of a server comes through here before it builds anything: the parent to resolve, a child
        when SGLang publishes the record it was sent.
        """
        if not isinstance(self.enable_claa, bool):
            stop(self, f"enable_claa={self.enable_claa!r}: give True or False, not text or a number")
        if not self.enable_claa and (given := asked_for({name: getattr(self, name) for name in FIELDS})):
            listed = ", ".join("--" + name.replace("_", "-") for name in given)
            stop(self, f"{listed} given without --enable-claa: add --enable-claa, or remove {listed}")
        if self.enable_claa and not getattr(self, "_resolution_finished", False):
            # The process that resolves the record runs the server; whoever gets a resolved one is its child.
            self._claa_server_pid = os.getpid()
        base.resolve_once(self)  # type: ignore[attr-defined]
        if self.enable_claa:
            activate(self)

    def reduce(self: Any) -> tuple[Any, ...]:
        """As SGLang pickles a record, but by the other plugin's class: the one on top of it has no name to find."""
        return _rebuild, (base, msgspec.structs.asdict(self), dict(self.__dict__))

    own = base is _own(base)
    return msgspec.defstruct(
        "ClaaServerArgs" if own else f"Claa{base.__name__}",
        fields,
        bases=(base,),
        dict=True,
        module=__name__,
        namespace={
            "__doc__": "SGLang's server arguments with the CLAA flags.",
            "_NS_BY_FIELD": {**base._NS_BY_FIELD, **dict.fromkeys(FIELDS, NAMESPACE)},  # type: ignore[attr-defined]
            "resolve_once": resolve_once,
            **({} if own else {"__reduce__": reduce}),
        },
    )


def _own(record_type: type) -> type:
    """SGLang's own class among those that `record_type` is made of; `record_type` where there is none."""
    return next((cls for cls in record_type.__mro__ if cls.__module__ == sglang_arguments.__name__), record_type)


ClaaServerArgs: Any = _build(_own(sglang_arguments.ServerArgs))
_combined: dict[type, type] = {}


def record_class(base: type) -> Any:
    """The record with the CLAA flags for those who use `base`: ClaaServerArgs, or for another plugin's subclass of
    SGLang's ServerArgs one on top of it, the same in each call.

    Raises TypeError for a class that cannot be extended.
    """
    if issubclass(base, ClaaServerArgs) or ENABLE in getattr(base, "__struct_fields__", ()):
        return base
    if base is ClaaServerArgs.__mro__[1]:
        return ClaaServerArgs
    if base not in _combined:
        _combined[base] = _build(base)
    return _combined[base]


def _rebuild(base: type, fields: dict[str, Any], bookkeeping: dict[str, Any]) -> Any:
    return sglang_arguments._rebuild_server_args(record_class(base), fields, bookkeeping)


def asked_for(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` (field -> value) that ask something of CLAA; empty for an engine that never asked."""
    given = {name: values[name] for name in FIELDS if values.get(name) is not None}
    return given if given.get(ENABLE) else {name: value for name, value in given.items() if name != ENABLE}


def from_command_line(words: Sequence[str]) -> Any:
    """The record of a server's command line, unresolved, with the CLAA fields if they are asked for.

    Plugins are loaded, as a server does first. SystemExit where SGLang's parser refuses the words.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return sglang_arguments.prepare_server_args(list(words))


def without_flags(record: Any) -> Any:
    """A record of the same arguments in SGLang's own class, unresolved. `record` itself stays as it is."""
    fields = {name: value for name, value in msgspec.structs.asdict(record).items() if name not in FIELDS}
    return ClaaServerArgs.__mro__[1](**fields)


def with_flags(record: Any, values: Mapping[str, Any]) -> Any:
    """SGLang's `record`, or another plugin's, with the CLAA fields of `values`. `record` itself stays as it is."""
    cls = record_class(type(record))
    ours = {name: values[name] for name in FIELDS if name in values}
    made = cls(**{**msgspec.structs.asdict(record), **ours})
    made.__dict__.update(record.__dict__)
    return made
