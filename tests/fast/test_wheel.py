"""What a wheel ships: all modules, the profiles, the licence, the mark of typed packages, and who it says it is."""

from __future__ import annotations

import email.message
import email.parser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import claa_sglang

ROOT = Path(__file__).resolve().parents[2]
NAME = f"claa_sglang-{claa_sglang.__version__}"
SOURCES = ("claa_sglang", "kernels", "patches", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of a copy of this tree: setuptools leaves its build folder beside the sources."""
    home = tmp_path_factory.mktemp("wheel")
    (tree := home / "tree").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    code = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(home)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (file,) = home.glob("*.whl")
    assert file.name == f"{NAME}-py3-none-any.whl"
    return zipfile.ZipFile(file)


def files(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    return email.parser.Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())


def test_every_module_is_in_it_and_nothing_else_is(wheel: zipfile.ZipFile) -> None:
    code = {name for name in files(wheel) if name.endswith(".py")}
    here = {"claa_sglang": ROOT / "claa_sglang", "claa_sglang/kernels": ROOT / "kernels"}
    here["claa_sglang/patches"] = ROOT / "patches"
    expected = {f"{to}/{file.relative_to(top)}" for to, top in here.items() for file in top.rglob("*.py")}
    # What leads from a checkout to the top folders; in a wheel these lie there themselves.
    assert code == expected - {"claa_sglang/kernels/__init__.py", "claa_sglang/patches/__init__.py"}


@pytest.mark.parametrize("folder", ["profiles", "plan/machines"])
def test_it_ships_records(wheel: zipfile.ZipFile, folder: str) -> None:
    records = {f"claa_sglang/{folder}/{file.name}" for file in (ROOT / "claa_sglang" / folder).glob("*.json")}
    assert records and records <= set(files(wheel))


def test_it_ships_the_mark_of_typed_packages_the_page_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    others = {name for name in files(wheel) if not name.endswith((".py", ".json"))}
    assert others == {"claa_sglang/py.typed", "claa_sglang/explain/page.html"}
    assert all(name.split("/")[1] in ("profiles", "plan") for name in files(wheel) if name.endswith(".json"))


def test_it_says_what_it_is_and_whose(wheel: zipfile.ZipFile) -> None:
    said = metadata(wheel)
    assert (said["Name"], said["Version"]) == ("claa-sglang", claa_sglang.__version__)
    assert (said["License-Expression"], said["License-File"]) == ("Apache-2.0", "LICENSE")
    assert said["Author"] == "claa-sglang contributors" and "sglang" in said["Keywords"]
    links = dict(url.rsplit(", ", 1)[::-1] for url in said.get_all("Project-URL", []))
    assert set(links) == {"https://arxiv.org/abs/2602.16054", "https://github.com/sgl-project/sglang"}
    licence = wheel.read(f"{NAME}.dist-info/licenses/LICENSE").decode()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


def test_the_changelog_has_this_version() -> None:
    assert f"## [{claa_sglang.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
