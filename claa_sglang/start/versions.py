"""Which versions are installed, as messages quote them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed(distribution: str) -> str:
    """The installed version of `distribution`, as pip names it; "(not installed)" where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"


def both() -> str:
    """`claa-sglang X, sglang Y`, the pair that has to fit."""
    return f"claa-sglang {installed('claa-sglang')}, sglang {installed('sglang')}"
