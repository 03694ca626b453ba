"""The command: a prompt from a file, two requests, one page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from claa_sglang.explain.asking import ask
from claa_sglang.explain.error import ExplainError
from claa_sglang.explain.page import make_page
from claa_sglang.tools.connection import Connection


def run(args: argparse.Namespace) -> int:
    """0 once the page is written. Raises ExplainError."""
    prompt = _prompt(args.prompt_file)
    _must_be_writable(args.out)
    server = Connection(args.url, args.api_key, args.timeout, error=ExplainError)
    found = ask(
        server,
        prompt,
        chat=args.chat,
        new=args.max_new_tokens,
        keep_rate=args.keep_rate,
        ranker=args.ranker,
    )
    page = make_page(found)
    try:
        # A token can decode to half a surrogate pair, which no file can hold.
        args.out.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise _not_writable(args.out, error) from error
    report = found.report
    print(f"{args.out}: {report['kept_tokens']:,} of {report['prompt_tokens']:,} tokens kept; it has the prompt's text")
    return 0


def _prompt(file: Path) -> str:
    try:
        prompt = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExplainError(f"--prompt-file {file}: is not UTF-8 text (byte {error.start}): convert it") from error
    except OSError as error:
        raise ExplainError(f"--prompt-file {file}: {error.strerror}: give a file that can be read") from error
    if not prompt.strip():
        raise ExplainError(f"--prompt-file {file}: is empty: write the prompt into it")
    return prompt


def _must_be_writable(out: Path) -> None:
    """Before anything is asked. Leaves no file behind. Raises ExplainError."""
    there = out.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
        if not there:
            os.remove(out)
    except OSError as error:
        raise _not_writable(out, error) from error


def _not_writable(out: Path, error: OSError) -> ExplainError:
    return ExplainError(f"--out {out}: {error.strerror}: give a file that can be written")
