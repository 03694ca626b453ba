"""What is installed here, and what the GPU is: probes that need no flags."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from claa_sglang.doctor.finding import Finding
from claa_sglang.patches import hooks
from claa_sglang.start import versions

PACKAGES = ("claa-sglang", "sglang", "torch", "triton", "flashinfer-python", "transformers")
# As Triton names what it compiled: a folder for each, with a JSON file of the kernel's name.
_KERNEL = re.compile(r"^def (_\w+_kernel)\(", re.MULTILINE)


def packages() -> Finding:
    """Versions, as pip names them."""
    listed = ", ".join(f"{name} {versions.installed(name)}" for name in PACKAGES)
    return Finding("versions", None, listed)


def device() -> Finding:
    """The first GPU, or that there is none."""
    import torch

    if not torch.cuda.is_available():
        return Finding("device", None, "no CUDA device: a server here is SGLang's CPU engine (claa-sglang cpu-env)")
    gpu = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    text = f"{count} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm{gpu.major}{gpu.minor}"
    return Finding("device", None, text)


def hook_table() -> Finding:
    """Every attribute of SGLang that is touched, against the installed one."""
    rows = hooks.collect()
    if problems := hooks.check(rows):
        return Finding("hooks", False, f"{len(problems)} of {len(rows)} do not fit", tuple(map(str, problems)))
    other = hooks.other_version(len(rows))
    return Finding("hooks", True, f"all {len(rows)} attributes fit this SGLang", (other,) if other else ())


def kernels() -> Finding:
    """Which of our Triton kernels are compiled here."""
    import torch

    if not torch.cuda.is_available():
        return Finding("kernels", None, "not used without a GPU")
    names = kernel_names()
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    compiled = {name for name in names if any(cache.glob(f"*/{name}.json"))}
    rest = "" if compiled == names else "; the first start compiles the others, in seconds"
    return Finding("kernels", True, f"{len(compiled)} of {len(names)} compiled in {cache}{rest}")


def kernel_names() -> set[str]:
    """Names of our Triton kernels, from their source."""
    spec = importlib.util.find_spec("claa_sglang.kernels.fold")
    assert spec is not None and spec.origin is not None
    sources = Path(spec.origin).parent.glob("*.py")
    return {name for source in sources for name in _KERNEL.findall(source.read_text())}
