"""A profile file with any of its values changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fast.config.profiles import PROFILE


@pytest.fixture
def write(tmp_path: Path):
    def write_profile(**changes: object) -> str:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({**PROFILE, **changes}))
        return str(path)

    return write_profile
