"""The environment under which SGLang's CPU engine runs on this machine.

The PyPI build of `sgl_kernel` is linked against the NVIDIA driver, `libcuda.so.1`, and does not import
without one, even when SGLang never touches a GPU. Where there is no driver, a stub takes its place: a shared
library that exports just the `cu*` symbols those packages import, each answering CUDA_ERROR_NO_DEVICE. It is
compiled once, kept in the user's cache under the hash of its source, and never built where a driver loads.

    eval "$(claa-sglang cpu-env)"
    python -m sglang.launch_server --device cpu --attention-backend torch_native --model-path ...
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

DRIVER = "libcuda.so.1"
CUDA_ERROR_NO_DEVICE = 100
# Packages of SGLang's CUDA build whose shared objects may be loaded while the CPU engine starts.
LINKED_PACKAGES = ("sgl_kernel", "torch", "deep_ep", "deep_gemm", "flash_mla", "humming")
_COMPILERS = ("cc", "gcc", "clang")
_DRIVER_SYMBOL = re.compile(r"\bU (cu[A-Z]\w*)")


class CpuEnvError(RuntimeError):
    """The CPU environment cannot be made here; the message says why and what to do."""


def cpu_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables to set, on top of `environ` (default: this process's), for SGLang's CPU engine.

    Always SGLANG_USE_CPU_ENGINE=1; LD_LIBRARY_PATH as well where the driver stub is needed, which is then
    built if it is not there yet. Changes nothing in this process. Raises CpuEnvError with a remedy.
    """
    environ = os.environ if environ is None else environ
    exports = {"SGLANG_USE_CPU_ENGINE": "1"}
    # A stub of ours that is already on the path must not pass for a driver.
    given = environ.get("LD_LIBRARY_PATH", "").split(":")
    search_path = [directory for directory in given if directory and not _is_stub_dir(Path(directory))]
    if not _driver_loads(search_path, environ):
        stub = build_stub(imported_driver_symbols())
        exports["LD_LIBRARY_PATH"] = ":".join([str(stub.parent), *search_path])
    return exports


def enter_cpu_environment() -> None:
    """Let this process import SGLang for its CPU engine, and its children inherit that. Raises CpuEnvError."""
    environment = cpu_environment()
    os.environ.update(environment)
    if stub_dir := environment.get("LD_LIBRARY_PATH", "").split(":")[0]:
        # The linker read LD_LIBRARY_PATH when this process started; what is loaded already, it finds by name.
        ctypes.CDLL(str(Path(stub_dir, DRIVER)), mode=ctypes.RTLD_GLOBAL)


def shell_exports(variables: Mapping[str, str]) -> str:
    """`export NAME=value` lines for a POSIX shell, quoted so that `eval` is safe."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def imported_driver_symbols(packages: Iterable[str] = LINKED_PACKAGES) -> list[str]:
    """Sorted `cu*` symbols that the shared objects of the installed `packages` leave undefined.

    The CUDA runtime's `cuda*` symbols are not among them: a lower-case letter follows the `cu`.
    Raises CpuEnvError if `nm` is missing or the first package, SGLang's kernels, is not installed.
    """
    nm = shutil.which("nm")
    if nm is None:
        raise CpuEnvError("`nm` was not found; it comes with the C compiler: apt-get install gcc binutils")
    files = [str(file) for name in packages for file in _shared_objects(name)]
    if not files:
        raise CpuEnvError(
            f"none of {', '.join(packages)} is installed in {sys.prefix}; install SGLang: pip install sglang"
        )
    # nm exits non-zero when one file has no dynamic symbols; what it could read is on stdout all the same.
    listed = subprocess.run([nm, "-D", "--undefined-only", *files], capture_output=True, text=True)
    return sorted(set(_DRIVER_SYMBOL.findall(listed.stdout)))


def build_stub(symbols: Iterable[str]) -> Path:
    """Path of the stub `libcuda.so.1` exporting `symbols`, compiled unless it is in the cache.

    Safe when several processes build at once: each compiles aside and renames. Raises CpuEnvError.
    """
    functions = "\n".join(f"int {name}(void) {{ return {CUDA_ERROR_NO_DEVICE}; }}" for name in symbols)
    source = f"/* Stand-in for the NVIDIA driver; every call answers CUDA_ERROR_NO_DEVICE. */\n{functions}\n"
    key = hashlib.sha256(f"{platform.machine()}\n{source}".encode()).hexdigest()[:16]
    stub = cache_dir() / key / DRIVER
    if stub.exists():
        return stub
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise CpuEnvError(
            f"no C compiler ({', '.join(_COMPILERS)}) on PATH to build the stand-in for {DRIVER}, which "
            "SGLang's kernels link against; install one (apt-get install gcc) or the NVIDIA driver"
        )
    try:
        stub.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=stub.parent) as temp:
            code, built = Path(temp, "stub.c"), Path(temp, DRIVER)
            code.write_text(source)
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", str(built), str(code)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CpuEnvError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
            built.replace(stub)
    except OSError as error:
        raise CpuEnvError(
            f"cannot write the driver stub to {stub.parent}: {error}; set XDG_CACHE_HOME to a writable one"
        ) from error
    return stub


def cache_dir() -> Path:
    """Directory of the stubs: $XDG_CACHE_HOME/claa-sglang/driver-stub, by default under ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "claa-sglang", "driver-stub")


def _is_stub_dir(directory: Path) -> bool:
    return directory.parent == cache_dir()


def _driver_loads(search_path: list[str], environ: Mapping[str, str]) -> bool:
    """Whether the dynamic linker finds a driver; asked in a child, because the linker reads its path once."""
    probe = f"import ctypes; ctypes.CDLL({DRIVER!r})"
    child = {**environ, "LD_LIBRARY_PATH": ":".join(search_path)}
    return not subprocess.run([sys.executable, "-S", "-c", probe], env=child, capture_output=True).returncode


def _shared_objects(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    roots = spec.submodule_search_locations or ([str(Path(spec.origin).parent)] if spec.origin else [])
    return sorted(file for root in roots for file in Path(root).rglob("*.so*") if file.is_file())
