"""Records of arguments as the tests of the flags make them, and a fresh interpreter for what only one can show."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass

from claa_sglang.arguments import ClaaServerArgs


def arguments(model: str, **given: Any) -> Any:
    cpu = {"device": "cpu", "attention_backend": "torch_native", "skip_tokenizer_init": True}
    return ClaaServerArgs(model_path=model, load_format="dummy", **{**cpu, **given})


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_cli_args_from_dataclass(parser, ClaaServerArgs)
    return parser.parse_args(["--model-path", "x", *flags])


def python(code: str, *args: str, **env: str) -> str:
    """The last line that a fresh interpreter prints which runs `code` with `args`."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]
