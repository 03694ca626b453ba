"""What a server's arguments say of CLAA: the flags given, the configuration they make, and whose process this is.

`server_args` is a record with the CLAA fields (`claa_sglang.arguments`), which this module does not need to import.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

from claa_sglang.config.config import ClaaConfig
from claa_sglang.config.flags import HELP, ClaaFlags, written
from claa_sglang.config.kv_type import KvType, kv_type
from claa_sglang.config.profile_choice import Choice, Model, choose
from claa_sglang.config.profile_model import describe
from claa_sglang.config.state_room import Room


def flags_of(server_args: Any) -> ClaaFlags:
    """What the operator gave, None where nothing; lists, paths and counts from Python as a command line has them."""
    return ClaaFlags(**{name: written(name, getattr(server_args, f"claa_{name}")) for name in HELP})


KEPT = "_claa_choice"  # the attribute of the record of arguments that keeps what was chosen


def config_of(server_args: Any) -> ClaaConfig:
    """The configuration of this server; see `choice_of`."""
    return choice_of(server_args).config


def choice_of(server_args: Any) -> Choice:
    """Configuration and profile of this server, from its resolved arguments and its model's configuration.

    Made once, in the process that runs the server, and kept on the record: child processes get it with the record,
    so profile files that change meanwhile cannot make two of them disagree. Raises ConfigError.
    """
    choice: Choice | None = getattr(server_args, KEPT, None)
    if choice is None:
        choice = choose(flags_of(server_args), model_of(server_args))
        setattr(server_args, KEPT, choice)
    return choice


def model_of(server_args: Any) -> Model:
    """The model of resolved arguments, as far as its configuration tells."""
    model, path = model_config_of(server_args), str(server_args.model_path)
    chunk = resolved_view(server_args).chunked_prefill_size or 0
    return Model(
        path=path,
        made=describe(model.hf_config.to_dict(), model.num_hidden_layers, Path(path).name),
        room=_room(server_args, model),
        max_window=chunk if chunk > 0 else None,
    )


def largest_window(server_args: Any) -> int | None:
    """Tokens that the last chunk of a prompt can have, whatever the chunks before it: a chunk, less what page ends
    take of it; None where prompts are not cut."""
    arguments = resolved_view(server_args)
    chunk = arguments.chunked_prefill_size or 0
    return chunk - (arguments.page_size or 1) + 1 if chunk > 0 else None


def _room(server_args: Any, model: Any) -> Room | None:
    """What a slot's KV rows hold on one rank; None for attention that is refused anyway, as it has no such rows."""
    if model.attention_arch.name != "MHA":
        return None
    heads, own = model.get_num_kv_heads(server_args.tp_size), model.dtype.itemsize
    is_fp8 = kv_type(server_args.kv_cache_dtype, str(model.dtype), model.hf_quant_config) is KvType.FP8
    return Room(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        layer_width=heads * (model.head_dim + model.v_head_dim) // (own if is_fp8 else 1),
        element_bytes=own,
    )


def context_length(server_args: Any) -> int:
    """Tokens that a request can have, prompt and answer together."""
    return model_config_of(server_args).context_len


def is_server_process(server_args: Any) -> bool:
    """Whether this process runs the server (HTTP, tokenizer, Engine), not one of its children."""
    return getattr(server_args, "_claa_server_pid", None) == os.getpid()
