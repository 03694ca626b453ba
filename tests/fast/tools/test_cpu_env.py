"""`claa-sglang cpu-env`: what it prints, what it builds, and what it says when it cannot."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from claa_sglang.tools import cpu_env

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@needs_compiler
def test_stub_exports_exactly_the_symbols_and_answers_no_device(cache: Path):
    stub = cpu_env.build_stub(["cuInit", "cuDeviceGet"])
    library = ctypes.CDLL(str(stub))
    assert library.cuInit(0) == cpu_env.CUDA_ERROR_NO_DEVICE
    assert library.cuDeviceGet(0) == cpu_env.CUDA_ERROR_NO_DEVICE
    with pytest.raises(AttributeError):
        _ = library.cuMemAlloc_v2
    assert [p.name for p in stub.parent.iterdir()] == [cpu_env.DRIVER], "leftovers of the build"


@needs_compiler
def test_stub_is_built_once_and_keyed_by_its_symbols(cache: Path):
    first = cpu_env.build_stub(["cuInit"])
    made = first.stat().st_mtime_ns
    assert cpu_env.build_stub(["cuInit"]) == first and first.stat().st_mtime_ns == made
    assert cpu_env.build_stub(["cuInit", "cuDeviceGet"]) != first


def test_symbols_are_the_drivers_and_not_the_runtimes():
    symbols = cpu_env.imported_driver_symbols()
    assert "cuPointerGetAttribute" in symbols
    assert not [name for name in symbols if name.startswith("cuda") or name.startswith("cublas")]
    assert symbols == sorted(set(symbols))


def test_missing_compiler_is_an_error_with_a_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(cpu_env.CpuEnvError, match="no C compiler.*apt-get install gcc"):
        cpu_env.build_stub(["cuInit"])


def test_missing_packages_are_an_error_with_a_remedy():
    with pytest.raises(cpu_env.CpuEnvError, match="pip install sglang"):
        cpu_env.imported_driver_symbols(["claa_no_such_package"])


def test_own_stub_on_the_path_does_not_pass_for_a_driver():
    once = cpu_env.cpu_environment()
    again = cpu_env.cpu_environment({**os.environ, **once})
    assert again == once


def test_the_users_library_path_is_kept(tmp_path: Path):
    before = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:"}
    exports = cpu_env.cpu_environment(before)
    if "LD_LIBRARY_PATH" in exports:
        assert exports["LD_LIBRARY_PATH"].split(":")[1:] == [str(tmp_path)]
    else:  # a real driver is here, and nothing stands in for it
        ctypes.CDLL("libcuda.so.1")


def test_exports_survive_a_shell():
    text = cpu_env.shell_exports({"A": "with space; and $HOME 'quotes'"})
    done = subprocess.run(["sh", "-c", f'{text} printf %s "$A"'], capture_output=True, text=True)
    assert done.stdout == "with space; and $HOME 'quotes'"


def test_the_command_prints_exports_only_and_sglangs_kernels_import_under_them():
    command = [sys.executable, "-m", "claa_sglang.cli", "cpu-env"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "SGLANG_USE_CPU_ENGINE" in printed
    assert all(line.startswith("export ") for line in printed.splitlines())
    script = f"{printed}\nexec {sys.executable} -c 'import sgl_kernel'"
    clean = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "SGLANG_USE_CPU_ENGINE")}
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-2000:]


def run_command(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`claa-sglang cpu-env` in `folder` by a user that the user database does not know, where no driver is."""
    nobody = (
        "import pwd, sys\n"
        "def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = unknown\n"
        "from claa_sglang import cli\n"
        "from claa_sglang.tools import cpu_env\n"
        "cpu_env._driver_loads = lambda *given: False\n"
        "sys.exit(cli.main(['cpu-env']))\n"
    )
    names = ("HOME", "XDG_CACHE_HOME", "LD_LIBRARY_PATH")
    clean = {k: v for k, v in os.environ.items() if k not in names} | environ
    return subprocess.run([sys.executable, "-c", nobody], cwd=folder, env=clean, capture_output=True, text=True)


@pytest.mark.parametrize(
    "environ",
    [{}, {"HOME": "home"}, {"XDG_CACHE_HOME": "cache"}, {"HOME": ".", "XDG_CACHE_HOME": ""}],
    ids=lambda environ: ",".join(f"{k}={v}" for k, v in environ.items()) or "none",
)
def test_no_folder_for_the_cache_is_one_line_with_a_remedy(tmp_path: Path, environ: dict[str, str]):
    done = run_command(tmp_path, **environ)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and not done.stdout and "export XDG_CACHE_HOME=/" in line
    assert not list(tmp_path.iterdir()), "a cache was made where the command happened to run"


@needs_compiler
def test_a_relative_cache_is_passed_over_for_the_one_in_the_home_folder(tmp_path: Path):
    home, folder = tmp_path / "home", tmp_path / "elsewhere"
    folder.mkdir()
    done = run_command(folder, HOME=str(home), XDG_CACHE_HOME="cache")
    assert f"LD_LIBRARY_PATH={home}/.cache/claa-sglang/driver-stub/" in done.stdout, done.stderr
    assert not list(folder.iterdir())


def test_no_folder_for_the_cache_matters_only_where_the_stub_is_needed(monkeypatch: pytest.MonkeyPatch):
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cpu_env, "_driver_loads", lambda *given: True)
    assert cpu_env.cpu_environment({"LD_LIBRARY_PATH": "/opt/driver"}) == {"SGLANG_USE_CPU_ENGINE": "1"}


def test_an_unreadable_home_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home"
    home.mkdir(mode=0)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # root may read everything
        with pytest.raises(cpu_env.CpuEnvError, match="Permission denied.*; set XDG_CACHE_HOME to a writable folder"):
            cpu_env.build_stub(["cuInit"])
    finally:
        if root:
            os.seteuid(0)
        home.chmod(0o700)
