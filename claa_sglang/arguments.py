"""`--enable-claa` and the `--claa-*` flags: a subclass of SGLang's ServerArgs that also refuses to be ignored.

SGLang unpickles the record in its child processes before it loads plugins, so this module imports on its own and
the class is a module attribute. The class is made inside a function on purpose: SGLang's hook registry rewrites
every module global that holds the class it replaces, and a global naming the base would come to name the subclass.
"""

from __future__ import annotations

import os
from typing import Any, get_type_hints

import msgspec
import sglang.srt.server_args as sglang_arguments
from sglang.srt.arg_groups.arg_utils import A, Arg
from sglang.srt.arg_groups.overrides import model_config_of

from claa_sglang.config.config import ClaaConfig
from claa_sglang.config.flags import HELP, ClaaFlags, resolve
from claa_sglang.config.profile_model import describe

ENABLE_HELP = (
    "Serve long prompts through CLAA: layers after the prune layer see only the prompt tokens that matter. Every "
    "process checks that it can, or the server does not start (default off). A request can override it with "
    'custom_params {"claa": {...}}.'
)
NAMESPACE = "claa"  # of SGLang's configuration tree, where it files the fields


def _build(base: type) -> type:
    """ServerArgs with the CLAA fields; `base` is SGLang's own, or what another plugin made of it."""
    types = get_type_hints(ClaaFlags)
    fields: list[tuple[str, Any, Any]] = [("enable_claa", A[bool, Arg(help=ENABLE_HELP)], False)]
    for name, text in HELP.items():
        fields.append((f"claa_{name}", A[types[name], Arg(help=f"{text}. Needs --enable-claa.")], None))

    def resolve_once(self: Any) -> None:
        """Resolve as SGLang does, then make this process one that serves CLAA, or raise.

        Every process of a server comes through here before it builds anything: the parent to resolve, a child
        when SGLang publishes the record it was sent.
        """
        if not self.enable_claa and (given := _given(self)):
            from claa_sglang.plugin import stop

            listed = ", ".join("--" + name.replace("_", "-") for name in given)
            stop(self, f"{listed} given without --enable-claa: add --enable-claa, or remove {listed}")
        if self.enable_claa and not getattr(self, "_resolution_finished", False):
            # The process that resolves the record runs the server; whoever gets a resolved one is its child.
            self._claa_server_pid = os.getpid()
        base.resolve_once(self)  # type: ignore[attr-defined]
        if self.enable_claa:
            from claa_sglang.plugin import activate

            activate(self)

    names = [name for name, _, _ in fields]
    return msgspec.defstruct(
        "ClaaServerArgs",
        fields,
        bases=(base,),
        dict=True,
        module=__name__,
        namespace={
            "__doc__": "SGLang's server arguments with the CLAA flags.",
            "_NS_BY_FIELD": {**base._NS_BY_FIELD, **dict.fromkeys(names, NAMESPACE)},  # type: ignore[attr-defined]
            "resolve_once": resolve_once,
        },
    )


ClaaServerArgs: Any = _build(sglang_arguments.ServerArgs)


def flags_of(server_args: Any) -> ClaaFlags:
    """What the operator gave, None where nothing. `claa_score_layers` may also be a list of layers from Python."""
    values = {name: getattr(server_args, f"claa_{name}") for name in ClaaFlags.__struct_fields__}
    if isinstance(values["score_layers"], list | tuple):
        values["score_layers"] = "".join(f"{layer}," for layer in values["score_layers"])
    return ClaaFlags(**values)


def config_of(server_args: Any) -> ClaaConfig:
    """The configuration of this server, from its resolved arguments and its model's configuration.

    Made once, in the process that runs the server, and kept on the record: child processes get it with the record,
    so a profile file that changes meanwhile cannot make two of them disagree. Raises ConfigError.
    """
    config = getattr(server_args, "_claa_config", None)
    if config is None:
        model = model_config_of(server_args)
        served = describe(model.hf_config.to_dict(), model.num_hidden_layers)
        config = resolve(flags_of(server_args), model.num_hidden_layers, served)
        server_args._claa_config = config
    return config


def is_server_process(server_args: Any) -> bool:
    """Whether this process runs the server (HTTP, tokenizer, Engine), not one of its children."""
    return getattr(server_args, "_claa_server_pid", None) == os.getpid()


def _given(server_args: Any) -> list[str]:
    return [f"claa_{name}" for name in HELP if getattr(server_args, f"claa_{name}") is not None]
