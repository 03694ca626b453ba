"""The hook table against the installed SGLang, and the mechanics on a module of our own with SGLang's real registry."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_context
from sglang.srt.server_args import ServerArgs

from claa_sglang.arguments import ClaaServerArgs
from claa_sglang.patches import hooks
from claa_sglang.patches.arguments import ARGUMENT_HOOKS
from claa_sglang.patches.hooks import Hook
from claa_sglang.start import versions

ROOT = Path(__file__).resolve().parents[3]
SOURCE = """
import functools

def greet(name, mark="!"):
    return name + mark

def decorate(fn):
    @functools.wraps(fn)
    def inner(*args, **kwargs):
        return fn(*args, **kwargs)
    return inner

@decorate
def decorated(name):
    return name

number = 7

class Thing:
    def method(self, x):
        return x
    @classmethod
    def make(cls, x):
        return (cls.__name__, x)
    @staticmethod
    def add(a, b):
        return a + b

class Child(Thing):
    pass
"""


@pytest.fixture
def target() -> Iterator[types.ModuleType]:
    """A module `claa_hook_target` that nobody has hooked; what a test hooks is forgotten afterwards."""
    module = types.ModuleType("claa_hook_target")
    exec(SOURCE, vars(module))
    for cls in (module.Thing, module.Child):
        cls.__module__ = module.__name__
    sys.modules[module.__name__] = module
    hooked, patched = dict(HookRegistry._hooks), set(HookRegistry._patched)
    yield module
    del sys.modules[module.__name__]
    HookRegistry._hooks.clear()
    HookRegistry._hooks.update(hooked)
    HookRegistry._patched.clear()
    HookRegistry._patched.update(patched)


def twice(original: Callable, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs) * 2


def row(name: str, params: tuple[str, ...], kind: str = "around", fn: Callable = twice, process: str = "all") -> Hook:
    return Hook(f"claa_hook_target.{name}", params, kind, fn, process, "A test.")


# --- the real table


def test_every_row_fits_the_installed_sglang() -> None:
    mismatches = hooks.check(hooks.collect() + ARGUMENT_HOOKS)
    assert not mismatches, hooks.explain(mismatches)


def test_every_patch_module_is_in_the_table() -> None:
    with_hooks = {p.stem for p in (ROOT / "patches").glob("*.py") if p.stem != "hooks" and "HOOKS" in p.read_text()}
    assert with_hooks == {*hooks.PATCH_MODULES, "arguments"}  # the last are in place before any of the others


def test_rows_are_complete() -> None:
    for hook in hooks.collect() + ARGUMENT_HOOKS:
        assert hook.kind in hooks.KINDS and hook.process in hooks.PROCESSES
        assert hook.reason and "\n" not in hook.reason and hook.target.startswith("sglang.")


def test_no_row_names_a_method_that_a_subclass_overrides_unseen() -> None:
    """A subclass that overrides a hooked method and does not call it would slip past the hook."""
    unseen = []
    for hook in hooks.collect():
        path, name = hook.target.rsplit(".", 1)
        owner = hooks.pkgutil.resolve_name(path)
        if not isinstance(owner, type):
            continue
        for subclass in _subclasses(owner):
            override = vars(subclass).get(name)
            if override is not None and subclass.__module__.startswith("sglang.") and "super()" not in _code(override):
                unseen.append(f"{subclass.__module__}.{subclass.__qualname__}.{name}")
    assert unseen == [u for u in unseen if any(part in u for part in REFUSED_SUBCLASSES)], unseen


# Subclasses of servers that refusals.py does not let start.
REFUSED_SUBCLASSES = ("disaggregation", "hybrid", "Mamba", "mamba", "hisparse", "HiSparse", "multi_tokenizer", "ray")


def _subclasses(cls: type) -> set[type]:
    return {child for direct in cls.__subclasses__() for child in {direct, *_subclasses(direct)}}


def _code(function: Any) -> str:
    import inspect

    return inspect.getsource(getattr(function, "__func__", function))


# --- check


@pytest.mark.parametrize(
    ("hook", "found"),
    [
        (row("absent", ()), "nothing: AttributeError"),
        (Hook("claa_no_such_module.f", (), "around", twice, "all", "A test."), "nothing: ModuleNotFoundError"),
        (row("Thing.absent", ("self",)), "nothing: AttributeError"),
        (row("greet", ("name",)), "parameters (name, mark)"),
        (row("greet", ("mark", "name")), "parameters (name, mark)"),
        (row("Thing.method", ("x",)), "parameters (self, x)"),
        (row("Thing.make", ("x",)), "parameters (cls, x)"),
        (row("number", ()), "a int: 7"),
        (row("Thing", ()), "a type"),
        (row("greet", ("name", "mark"), "replace", dict), "a function"),
        (row("greet", ("name", "mark"), "beside"), "beside, all"),
        (row("greet", ("name", "mark"), process="parent"), "around, parent"),
        (row("Child.make", ("cls", "x")), "an inherited classmethod"),
        (row("Child.add", ("a", "b")), "an inherited staticmethod"),
    ],
    ids=lambda value: value.target.removeprefix("claa_") if isinstance(value, Hook) else "",
)
def test_a_row_that_does_not_fit_says_what_was_found(target: Any, hook: Hook, found: str) -> None:
    (mismatch,) = hooks.check([hook])
    assert mismatch.target == hook.target and found in mismatch.found
    text = hooks.explain([mismatch])
    assert hook.target in text and mismatch.expected in text and mismatch.found in text
    assert f"pip install sglang=={hooks.SUPPORTED_SGLANG}" in text and versions.installed("sglang") in text


@pytest.mark.parametrize(
    "hook",
    [
        row("greet", ("name", "mark")),
        row("decorated", ("name",)),
        row("Thing.method", ("self", "x")),
        row("Child.method", ("self", "x")),
        row("Thing.make", ("cls", "x")),
        row("Thing.add", ("a", "b")),
    ],
    ids=lambda hook: hook.target.removeprefix("claa_hook_target."),
)
def test_a_row_that_fits_is_applied_and_still_fits(target: Any, hook: Hook) -> None:
    assert hooks.check([hook]) == []
    hooks.apply("scheduler", [hook])
    assert hooks.check([hook]) == [] and hook.target in HookRegistry._patched


# --- apply


def test_apply_hooks_each_kind_and_every_importer(target: Any) -> None:
    importer = types.ModuleType("claa_hook_importer")
    importer.greet = target.greet  # what `from claa_hook_target import greet` leaves
    sys.modules[importer.__name__] = importer
    try:
        hooks.apply(
            "server",
            [row("greet", ("name", "mark")), row("Thing.make", ("cls", "x")), row("Thing.add", ("a", "b"))],
        )
        assert target.greet("a") == importer.greet("a") == "a!a!"
        assert target.Child.make(1) == ("Child", 1, "Child", 1) and target.Thing.add(1, 2) == 6
    finally:
        del sys.modules[importer.__name__]


def test_apply_twice_is_the_same_as_once(target: Any) -> None:
    asks = row("greet", ("name", "mark"), "after", lambda result, *args, **kwargs: result + "?")
    table = [row("greet", ("name", "mark")), asks]
    for _ in range(2):
        assert len(hooks.apply("server", table)) == 2
        assert target.greet("a") == "a!a!?"
        HookRegistry.apply_hooks()  # as SGLang does when it loads plugins again
    assert target.greet("a") == "a!a!?"


def test_apply_takes_the_rows_of_the_process_only(target: Any) -> None:
    table = [row("greet", ("name", "mark"), process="server"), row("Thing.add", ("a", "b"), process="scheduler")]
    assert hooks.apply("scheduler", table) == (table[1],)
    assert target.greet("a") == "a!" and target.Thing.add(1, 2) == 6


def test_nothing_is_applied_when_one_row_does_not_fit(target: Any) -> None:
    with pytest.raises(hooks.HookError, match="expected.*\n.*found"):
        hooks.apply("server", [row("greet", ("name", "mark")), row("Thing.add", ("a",))])
    assert target.greet("a") == "a!"


def test_a_target_that_another_plugin_replaced_is_refused(target: Any) -> None:
    HookRegistry.register("claa_hook_target.greet", lambda name, mark="!": "other", HookType.REPLACE)
    HookRegistry.apply_hooks()
    with pytest.raises(hooks.HookError, match="replaced by"):
        hooks.apply("server", [row("greet", ("name", "mark"))])
    assert target.greet("a") == "other"


def test_a_target_that_another_plugin_wraps_gets_ours_on_top_and_theirs_once(target: Any) -> None:
    HookRegistry.register("claa_hook_target.greet", lambda result, *a, **k: result + "~", HookType.AFTER)
    HookRegistry.apply_hooks()
    hooks.apply("server", [row("greet", ("name", "mark"))])
    HookRegistry.apply_hooks()
    assert target.greet("a") == "a!~a!~"


def test_a_hook_that_did_not_take_is_seen(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's registry logs what goes wrong and carries on; make it go wrong inside the registry."""

    def broken(target_path: str, entries: list) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(HookRegistry, "_apply_target", broken)
    with pytest.raises(hooks.HookError, match="did not take"):
        hooks.apply("server", [row("greet", ("name", "mark"))])


def test_a_hook_that_was_undone_is_applied_again(target: Any) -> None:
    stock, table = target.greet, [row("greet", ("name", "mark"))]
    hooks.apply("server", table)
    target.greet = stock
    hooks.apply("server", table)
    assert target.greet("a") == "a!a!"


# --- the gate

STOCK, WITH_CLAA, OFF = ServerArgs(model_path="x"), *(ClaaServerArgs(model_path="x", enable_claa=on) for on in (1, 0))


@pytest.mark.parametrize(
    ("record", "acts"), [(STOCK, False), (WITH_CLAA, True), (OFF, False)], ids=["stock", "on", "off"]
)
def test_a_hook_of_the_server_acts_for_servers_with_claa_alone(
    target: Any, record: Any, acts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the server started last, a call belongs to the server of its object; a call without one to the last."""
    told: list[Any] = []
    table = [
        row("Thing.method", ("self", "x"), "before", lambda *given: told.append("before"), "server"),
        row("Thing.method", ("self", "x"), "around", lambda stock, *given: [stock(*given), "around"], "server"),
        row("Thing.method", ("self", "x"), "after", lambda result, *_: [*result, "after"], "server"),
        row("greet", ("name", "mark"), "after", lambda result, *_: result + "?", "server"),
    ]
    for _ in range(2):
        assert len(hooks.apply("server", table)) == 4
    for last in (None, STOCK, WITH_CLAA):
        monkeypatch.setattr(get_context(), "_server_args", last)
        assert target.greet("a") == ("a!?" if last is WITH_CLAA else "a!")
        for attributes in ({"server_args": record}, {"tokenizer_manager": types.SimpleNamespace(server_args=record)}):
            thing = target.Thing()
            vars(thing).update(attributes)
            told.clear()
            assert thing.method(1) == ([1, "around", "after"] if acts else 1) and bool(told) == acts
        assert target.Thing().method(record) == ([record, "around", "after"] if acts else record)
