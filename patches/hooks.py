"""The table of every SGLang attribute that CLAA touches, and the only place that touches them.

SGLang's hook registry logs a target that is missing and goes on. Here each row is compared with the installed SGLang
before anything is registered, and looked up again after it was applied; what does not hold is a Mismatch, and the
caller stops the server.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from claa_sglang.start import startup_time, versions

SUPPORTED_SGLANG = "0.5.23"

# Modules of claa_sglang.patches that export HOOKS.
PATCH_MODULES: tuple[str, ...] = (
    "startup",
    "memory",
    "forward_batch",
    "attention",
    "layers",
    "requests",
    "admission",
    "late_prefill",
    "capacity",
    "policy",
    "ranks",
    "finishing",
    "metrics",
    "failures",
    "checks",
    "report",
    "tokenizer",
    "shadow",
    "openai",
    "routes",
    "server_info",
)

SERVER, SCHEDULER, ALL = "server", "scheduler", "all"
ALWAYS = "always"  # in every process that loads plugins, with `--enable-claa` or without
PROCESSES = (SERVER, SCHEDULER, ALL, ALWAYS)
KINDS = ("before", "after", "around", "replace")


class Hook(NamedTuple):
    """One attribute of SGLang that is touched.

    target: dotted path, module first.
    params: parameter names of the installed function in order, `self` or `cls` included; of a class, the fields of
        a Struct or the parameters of `__init__` (empty: not compared).
    kind: "before", "after", "around" or "replace", as SGLang's HookRegistry means them.
    fn: what is called, or the class that replaces a class.
    process: "server" (HTTP server, tokenizer manager, Engine), "scheduler" or "all"; "always" for what makes the flags
        known, which is not applied by `apply`.
    reason: one sentence on why the attribute is touched.
    """

    target: str
    params: tuple[str, ...]
    kind: str
    fn: Callable
    process: str
    reason: str


class Mismatch(NamedTuple):
    """A row that does not hold: what was expected of `target` and what was found there."""

    target: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.target}\n      expected: {self.expected}\n      found:    {self.found}"


class HookError(RuntimeError):
    """The installed SGLang is not the one the table was written for. The text has expected, found and remedy."""

    def __init__(self, mismatches: Iterable[Mismatch]):
        self.mismatches = tuple(mismatches)
        super().__init__(explain(self.mismatches))


def collect() -> tuple[Hook, ...]:
    """All rows, in the order of PATCH_MODULES. Imports the patch modules, and with them parts of SGLang."""
    with startup_time.counted("imports"):
        modules = [importlib.import_module(f"claa_sglang.patches.{name}") for name in PATCH_MODULES]
    return tuple(hook for module in modules for hook in module.HOOKS)


def check(hooks: Iterable[Hook]) -> list[Mismatch]:
    """Compare each row with the installed SGLang; changes nothing. A row whose hook is applied already still holds."""
    return [mismatch for hook in hooks for mismatch in _check_row(hook)]


def apply(process: str, hooks: Iterable[Hook] | None = None) -> tuple[Hook, ...]:
    """Register, apply and verify the rows of `process`; returns them. Twice in a process is the same as once.

    Raises HookError if a row does not hold, another plugin replaced its target, or the hook did not take; nothing is
    applied unless every row of the process holds.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    from claa_sglang.patches.gate import gated

    table = collect() if hooks is None else tuple(hooks)
    rows = tuple(hook for hook in table if hook.process in (process, ALL))
    todo = [hook for hook in rows if not _took(hook)]
    if problems := check(rows) + [m for hook in todo for m in _replaced_by_another(hook)]:
        raise HookError(problems)
    by_target: dict[str, list[tuple]] = {}
    for hook in todo:
        fn = gated(hook.kind, hook.fn) if hook.process == SERVER else hook.fn
        entry = (HookType(hook.kind), fn, HookSource(plugin_name="claa", dist_name="claa-sglang"))
        by_target.setdefault(hook.target, []).append(entry)
    # The registry applies a target once. Where another plugin hooked it first, ours go on top of theirs; its list
    # must hold ours alone meanwhile, or theirs would be applied a second time.
    others = {target: list(HookRegistry._hooks.get(target, ())) for target in by_target}
    try:
        for target, entries in by_target.items():
            HookRegistry._patched.discard(target)
            HookRegistry._hooks[target] = []
            for kind, fn, source in entries:
                HookRegistry.register(target, fn, kind, source=source)
        with _one_walk():
            HookRegistry.apply_hooks()
    finally:
        for target, before in others.items():
            HookRegistry._hooks[target] = before + HookRegistry._hooks[target]
    failed = [hook for hook in rows if hook.target not in HookRegistry._patched or not _took(hook)]
    if failed:
        raise HookError(
            Mismatch(hook.target, f"our {hook.kind} hook in place", "it did not take; SGLang's log says why")
            for hook in failed
        )
    _applied[os.getpid()] = len(rows)
    return rows


@contextmanager
def _one_walk() -> Iterator[None]:
    """Inside, names that other modules imported are not replaced hook by hook; afterwards all are, in one walk.

    The registry looks for them in every name of every module, for each hook again: over a second of a start.
    """
    from sglang.srt.plugins import hook_registry

    replaced: dict[int, tuple[Any, Any, Any]] = {}

    def remember(original: Any, wrapped: Any, source: Any) -> int:
        replaced.setdefault(id(original), (original, wrapped, source))
        return 0

    walk, hook_registry._propagate_patch = hook_registry._propagate_patch, remember
    try:
        yield
    finally:
        hook_registry._propagate_patch = walk
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType):
            for name, value in list(vars(module).items()):
                _, wrapped, source = replaced.get(id(value), (None, None, module))
                if module is not source:
                    setattr(module, name, wrapped)


_applied: dict[int, int] = {}


def applied_count() -> int:
    """Number of rows applied and verified in this process; 0 where none were."""
    return _applied.get(os.getpid(), 0)


def explain(mismatches: Iterable[Mismatch]) -> str:
    """The refusal: each mismatch, the versions, and what to do."""
    rows = "\n".join(f"  - {mismatch}" for mismatch in mismatches)
    return (
        f"claa-sglang {versions.installed('claa-sglang')} does not fit the installed sglang "
        f"{versions.installed('sglang')}, so "
        f"--enable-claa cannot work and the server does not start:\n{rows}\n"
        f"  What to do: pip install sglang=={SUPPORTED_SGLANG} (the version this claa-sglang was written for; in a "
        "container, take an image with that version, as this replaces the image's own), or install a claa-sglang made "
        "for your sglang. If the version is right, another plugin or a local change altered these attributes: remove "
        "it (SGLANG_PLUGINS=claa loads this plugin alone)."
    )


def other_version(rows: int) -> str | None:
    """What to log where `rows` rows fit a SGLang of another version; None where it is the one they were written for.

    The rows decide, not the name: images call a rebuilt SGLang 0.5.23.post1, or a development version.
    """
    found = versions.installed("sglang")
    if found.split("+")[0] == SUPPORTED_SGLANG:
        return None
    return (
        f"claa-sglang was written for sglang {SUPPORTED_SGLANG} and the installed one is called {found}. All {rows} "
        "attributes of docs/hooks.md are there with the expected parameters, so it starts; what they do inside is not "
        "compared. Where answers matter, hold a request with keep_rate 1 against one with enabled false."
    )


def _check_row(hook: Hook) -> Iterator[Mismatch]:
    if hook.kind not in KINDS or hook.process not in PROCESSES:
        yield Mismatch(hook.target, f"kind in {KINDS}, process in {PROCESSES}", f"{hook.kind}, {hook.process}")
        return
    expected = f"a {'class' if isinstance(hook.fn, type) else 'function'} with parameters {_listed(hook.params)}"
    try:
        attribute, inherited = _raw(hook.target)
    except (ImportError, AttributeError, ValueError) as error:
        yield Mismatch(hook.target, expected, f"nothing: {type(error).__name__}: {error}")
        return
    if isinstance(attribute, classmethod | staticmethod):
        if inherited:
            # The registry would bind it to the parent class.
            yield Mismatch(hook.target, "defined in the class itself", f"an inherited {type(attribute).__name__}")
            return
        attribute = attribute.__func__
    if isinstance(attribute, type) != isinstance(hook.fn, type) or not callable(attribute):
        yield Mismatch(hook.target, expected, f"a {type(attribute).__name__}: {attribute!r}")
        return
    if isinstance(attribute, type) and (hook.kind != "replace" or not hook.params):
        if hook.kind != "replace":
            yield Mismatch(hook.target, "kind replace, as the target is a class", f"kind {hook.kind}")
        return
    try:
        found = tuple(inspect.signature(inspect.unwrap(attribute)).parameters)
    except (TypeError, ValueError) as error:
        yield Mismatch(hook.target, expected, f"no readable signature: {error}")
        return
    if found != tuple(hook.params):
        yield Mismatch(hook.target, f"parameters {_listed(hook.params)}", f"parameters {_listed(found)}")


def _listed(names: Iterable[str]) -> str:
    return f"({', '.join(names)})"


def _raw(target: str) -> tuple[Any, bool]:
    """The attribute at `target` without descriptors applied, and whether its class inherits it."""
    path, name = target.rsplit(".", 1)
    owner = pkgutil.resolve_name(path)
    if isinstance(owner, type):
        for cls in owner.__mro__:
            if name in vars(cls):
                return vars(cls)[name], cls is not owner
        raise AttributeError(f"class {path} has no attribute {name!r}")
    return getattr(owner, name), False


def _took(hook: Hook) -> bool:
    """Whether the attribute is, or wraps through, our function: the registry's wrappers hold it in a closure."""
    try:
        attribute, _ = _raw(hook.target)
    except (ImportError, AttributeError, ValueError):
        return False
    if isinstance(hook.fn, type):
        return isinstance(attribute, type) and issubclass(attribute, hook.fn)
    if isinstance(attribute, classmethod | staticmethod):
        attribute = attribute.__func__
    return any(_is_same(held, hook.fn) for layer in _layers(attribute) for held in _closure(layer))


def _layers(function: Any) -> Iterator[Any]:
    """The function and what it wraps, outermost first."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _closure(function: Any) -> list[Any]:
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells if _filled(cell)]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_same(held: Any, fn: Callable) -> bool:
    """Whether a wrapper holds `fn`: itself, with arguments given, or behind our gate."""
    return fn in (held, getattr(held, "__wrapped__", None)) or (isinstance(held, functools.partial) and held.func is fn)


def _replaced_by_another(hook: Hook) -> Iterator[Mismatch]:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType, _format_source

    for kind, fn, source in HookRegistry._hooks.get(hook.target, ()):
        if kind is HookType.REPLACE and fn is not hook.fn:
            name = getattr(fn, "__qualname__", repr(fn))
            yield Mismatch(hook.target, "SGLang's own", f"replaced by {name} ({_format_source(source)})")
