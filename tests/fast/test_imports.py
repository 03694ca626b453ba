"""Who imports whom, read from the sources: only tests need tests, and nothing goes round."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT


def imported(file: Path) -> Iterator[str]:
    """Names of what a file imports anywhere, within functions too; of `from a import b`, `a.b`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", ["benchmarks", "claa_sglang", "examples", "kernels", "patches"])
def test_only_tests_import_tests(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [file.name for file in files if any(name.split(".")[0] == "tests" for name in imported(file))] == []


def test_no_module_reaches_itself() -> None:
    files = _modules()
    names: dict[str, set[str]] = {}
    for module, file in files.items():
        found = (name if name in files else name.rpartition(".")[0] for name in imported(file))
        names[module] = {name for name in found if name in files} - {module}
    reached = {module: _reached(module, names) for module in files}
    circles = [{b for b in reached[a] if a in reached[b]} for a in files if a in reached[a]]
    assert len(files) > 80
    assert circles == []


def _modules() -> dict[str, Path]:
    """Files of the package by module name; kernels and patches are links in it."""
    found = {}
    for folder, prefix in (("claa_sglang", ""), ("kernels", "claa_sglang."), ("patches", "claa_sglang.")):
        for file in (ROOT / folder).rglob("*.py"):
            name = prefix + ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


def _reached(start: str, names: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        for name in names[ahead.pop()] - seen:
            seen.add(name)
            ahead.append(name)
    return seen
