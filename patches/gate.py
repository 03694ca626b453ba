"""Hooks of the server act for servers that serve CLAA, and for no other that the process starts.

`sglang.Engine` can be started, shut down and started again in one process, with CLAA and without, and hooks stay
where they were applied. So each asks whose call it is; for a server without `--enable-claa` it is SGLang's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any


def gated(kind: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, a hook of `kind` before, after or around, for calls of servers with CLAA; nothing happens in others."""
    skip = {"before": 0, "after": 1, "around": 1}[kind]  # what the registry puts before the call's own arguments

    @functools.wraps(fn)
    def gate(*args: Any, **kwargs: Any) -> Any:
        if serves_claa((*args[skip:], *kwargs.values())):
            return fn(*args, **kwargs)
        return args[0](*args[1:], **kwargs) if kind == "around" else None

    return gate


def serves_claa(values: Iterable[Any]) -> bool:
    """Whether the server that a call with these arguments belongs to was started with `--enable-claa`.

    That is the server of the first argument that has one (an engine, a tokenizer manager, a route that holds one, or
    the server arguments themselves); where none has, as in a function of a request's body, the one started last.
    """
    from sglang.srt.runtime_context import get_context

    for value in values:
        for holder in (value, getattr(value, "tokenizer_manager", None)):
            for record in (holder, getattr(holder, "server_args", None)):
                if hasattr(type(record), "resolve_once"):
                    return bool(getattr(record, "enable_claa", False))
    return bool(getattr(get_context()._server_args, "enable_claa", False))
