"""Do servers take these flags? Prints what is wrong, a line each. A program of its own, as it imports SGLang.

echo '[["--model-path", "DIR", "--enable-claa"]]' | python -m benchmarks.answers.flags
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def wrong(flags: Sequence[str]) -> str:
    """What SGLang or CLAA would refuse, as far as flags alone and the number of layers show; "" if nothing."""
    from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass

    from claa_sglang.arguments import ClaaServerArgs
    from claa_sglang.config.flags import ClaaFlags, resolve

    parser, said = argparse.ArgumentParser(), io.StringIO()
    add_cli_args_from_dataclass(parser, ClaaServerArgs)
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(flags)
        if args.enable_claa:
            layers = json.loads(Path(args.model_path, "config.json").read_text())["num_hidden_layers"]
            given = {name: getattr(args, f"claa_{name}") for name in ClaaFlags.__struct_fields__}
            resolve(ClaaFlags(**{**given, "profile": None}), layers)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
    except (ValueError, KeyError) as error:
        return str(error)
    return ""


def main() -> int:
    found = [(flags, why) for flags in json.load(sys.stdin) if (why := wrong(flags))]
    for flags, why in found:
        print(f"{' '.join(flags)}: {why}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
