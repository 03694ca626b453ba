"""Put the times of another run into a record of answers: JSON and figure then show these, and name the card of each.

    python -m benchmarks.answers.times RECORD.json --times QUIET.json [--rename OLD NEW …]

For a record whose own times were taken while the host answered other prompts; they stay in it, as `times of its own`.
`--rename` is for a ranker that has another name since: `--rename claa claa:last=off --rename claa:last=on claa`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.answers import merge

AS_WRITTEN = ("claa", "plan")  # a server's configuration and what was asked keep the names they had
NAMES = ("ranker", "ran")
SOURCE = ("command", "date", "card", "host", "versions", "server", "stock")


class TimesError(ValueError):
    """The two records do not belong together; the message says why."""


def with_times(record: dict[str, Any], other: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    """The record with the times of the other one, which it names. Raises TimesError."""
    for name, value in (("model", lambda one: one["model"]), ("layers", lambda one: _layers(one["claa"]))):
        if value(record) != value(other):
            raise TimesError(f"{name}: {value(record)} were asked and {value(other)} timed")
    if not other["ttft"]:
        raise TimesError("nothing was timed in the other run")
    found = {name: value if name in AS_WRITTEN else _renamed(value, renames) for name, value in record.items()}
    own = {name: found[name] for name in ("card", "date", "ttft")}
    found |= {"times of its own": own, "ttft": other["ttft"], "timed on": other["device"]}
    found["timed by"] = {name: other[name] for name in SOURCE if name in other}
    return found | ({"renamed since": dict(renames)} if renames else {})


def _layers(claa: Mapping[str, Any]) -> list[tuple[int, list[int]]]:
    return [(step["prune_layer"], list(step["score_layers"])) for step in claa["steps"]]


def _renamed(value: Any, renames: Mapping[str, str]) -> Any:
    """NAMES of everything in it."""
    if isinstance(value, dict):
        return {
            name: renames.get(one, one) if name in NAMES and isinstance(one, str) else _renamed(one, renames)
            for name, one in value.items()
        }
    return [_renamed(one, renames) for one in value] if isinstance(value, list) else value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answers.times", description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON of benchmarks.answers_run; it is written again, with its PNG")
    parser.add_argument("--times", type=Path, required=True, help="JSON of another run, which has the times")
    parser.add_argument("--rename", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="a ranker")
    args = parser.parse_args(argv)
    record, other = (json.loads(path.read_text()) for path in (args.record, args.times))
    try:
        found = with_times(record, other, dict(args.rename))
    except TimesError as error:
        print(f"{args.times}: {error}", file=sys.stderr)
        return 1
    from benchmarks import eval_quality_plot

    merge.save_record(found, args.record)
    eval_quality_plot.draw(found, eval_quality_plot.ALL, eval_quality_plot.ALL, args.record.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
