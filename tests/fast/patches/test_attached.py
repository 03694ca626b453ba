"""One module says what CLAA hangs on SGLang's objects: no other file spells such an attribute."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from claa_sglang.patches import attached
from tests.conftest import ROOT

OURS = re.compile(r"_?claa(_\w+)?")
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}
NAMES = {made._name for made in vars(attached).values() if isinstance(made, attached.Attached)}


def spelled(source: str) -> Iterator[str]:
    """Attributes named as ours are, in any way Python has; strings that are one of the names, except for the word
    "claa", which is also the key of reports."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) if OURS.fullmatch(name):
                yield name
            case ast.Call(func=ast.Name(id=function), args=[_, ast.Constant(value=str(name)), *_]):
                if function in BY_NAME and OURS.fullmatch(name):
                    yield name
            case ast.Constant(value=str(name)) if name in NAMES - {"claa"}:
                yield name


FILES = sorted(
    file
    for folder in ("patches", "tests/fast/patches", "tests/fast/policy", "tests/fast/requests")
    for file in (ROOT / folder).glob("*.py")
    if file.name not in {"attached.py", "test_attached.py"}
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_file_spells_an_attached_name(file: Path) -> None:
    assert list(spelled(file.read_text())) == []


def test_the_search_finds_every_way_to_spell_one() -> None:
    assert len(FILES) > 20 and len(NAMES) == 13
    ways = ["req.claa", "req.claa = 1", 'getattr(req, "claa", None)', 'setattr(pool, "claa_new", 1)']
    ways += ["tree.claa_window", 'NAME = "_claa_reports"', "pool.claa_new = 1"]
    assert [len(list(spelled(way))) for way in ways] == [1] * len(ways)
    assert list(spelled('import claa_sglang.patches.memory as m\ninfo.get("claa")\nargs.enable_claa')) == []


def test_what_hangs_on_an_object() -> None:
    pool = SimpleNamespace()
    assert attached.window.find(pool) is None
    with pytest.raises(AttributeError):
        attached.window.of(pool)
    assert attached.window.hang(pool, 4) == attached.window.of(pool) == attached.window.find(pool) == 4


def test_the_document_of_the_module_lists_all() -> None:
    listed = set(re.findall(r"^\| [^|]* \| `(\w+)` \|", attached.__doc__ or "", re.MULTILINE))
    assert listed == NAMES
