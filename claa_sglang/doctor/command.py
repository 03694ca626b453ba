"""The command: probes one after the other, a table or JSON, and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import shlex
from collections.abc import Sequence

from claa_sglang.config.config import ConfigError
from claa_sglang.doctor import machine, start
from claa_sglang.doctor.finding import Finding, found, is_ready
from claa_sglang.doctor.remedies import Words, startable
from claa_sglang.doctor.start import FLAG, Start, try_start

# What is there whatever the flags are.
HERE = {
    "versions": machine.packages,
    "device": machine.device,
    "hooks": machine.hook_table,
    "kernels": machine.kernels,
}


def run(args: argparse.Namespace) -> int:
    """0 if a server would start with these flags, else 1."""
    words = tuple(args.flags[1:] if args.flags[:1] == ["--"] else args.flags)
    with _quiet():
        findings = examine(words)
        other = found_flags(words) if words and is_ready_here(findings) and not is_ready(findings) else None
    if args.json:
        record = {
            "ready": is_ready(findings),
            "findings": [finding._asdict() for finding in findings],
            "would_start": None if other is None else list(other),
        }
        print(json.dumps(record, indent=1))
    else:
        print("\n".join(line for finding in findings for line in finding.lines))
        print(_verdict(findings, words, other))
    return 0 if is_ready(findings) else 1


def examine(words: Words) -> list[Finding]:
    """Every probe's finding; those of the start only where flags are given."""
    findings = [found(name, probe) for name, probe in HERE.items()]
    if not words:
        return [*findings, Finding("start", None, "give a server's flags after --, such as -- --model-path MODEL")]
    made: list[Start] = []

    def arguments() -> Finding:
        made.append(try_start(words))
        return Finding("arguments", True, "SGLang takes them")

    findings.append(found("arguments", arguments))
    if made:
        (one,) = made
        findings.append(found("configuration", lambda: start.configuration(one)))
        findings.append(found("flags and model", lambda: start.combination(one)))
        findings.append(found("memory", lambda: start.memory(one)))
    return findings


def is_ready_here(findings: Sequence[Finding]) -> bool:
    """Whether nothing speaks against a start but its flags."""
    return is_ready(finding for finding in findings if finding.name in HERE)


def found_flags(words: Words) -> Words | None:
    """Flags near these with which a server would start."""
    try:
        return startable(words, _problems)
    except (Exception, SystemExit):  # noqa: BLE001
        return None


def _problems(words: Words) -> Sequence[str]:
    one = try_start(words)
    own = [f"Remedy: {one.choice}"] if isinstance(one.choice, ConfigError) else []
    return [*own, *one.refused]


def _verdict(findings: Sequence[Finding], words: Words, other: Words | None) -> str:
    if not is_ready_here(findings):
        return f"A server with {FLAG} would not start here, whatever its flags: see NO above."
    if not words:
        return "The parts that need no flags are checked."
    if is_ready(findings):
        return f"A server with {FLAG} would start with these flags."
    if other is None:
        return "A server would not start with these flags, and none near them were found."
    with_claa = other if FLAG in other else (*other, FLAG)
    return f"A server would not start with these flags. It would with:\n  {shlex.join(with_claa)}"


@contextlib.contextmanager
def _quiet():
    """What SGLang prints and logs on the way is not the report."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
