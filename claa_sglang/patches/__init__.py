"""A checkout has these modules in its top folder `patches`; a wheel has them here (pyproject.toml, package-dir)."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "patches")]
