"""Shell blocks of the documents, understood without being run: each command is held against what will parse it.

A command that is not known here is an AssertionError that says what to do: teach it to COMMANDS, or tag the block
`text` if it is not meant to be typed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from unittest import mock

from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass

from claa_sglang import cli
from claa_sglang.arguments import ClaaServerArgs
from claa_sglang.config.flags import ClaaFlags, resolve
from tests.documents import ROOT

OPERATORS = {"&&", "||", "|", ";", "&"}
REDIRECTIONS = {">", ">>", "<", "2>", "&>", ">&"}
TOP_FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} | {".ci"}
LAYERS = 80  # of the model that launch flags are checked for; documents name layers of smaller ones
Words = list[str]


def check(text: str) -> int:
    """Check every command of a shell block; returns their number. Raises AssertionError naming the command."""
    count = 0
    for words in _commands(text):
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]  # an assignment alone, or before a command
        if not words:
            continue
        count += 1
        name = words[0].rsplit("/", 1)[-1]
        known = COMMANDS.get(name)
        assert known, (
            f"`{shlex.join(words)}`: {name} is no command known to tests/shell_blocks.py ({', '.join(COMMANDS)})"
        )
        known(words[1:])
        _check_files(words)
    return count


def _commands(text: str) -> Iterator[Words]:
    """The simple commands of a block: continued lines joined, comments and redirections gone, $(...) taken out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        line = line.strip().removeprefix("$ ")
        for inner in re.findall(r"\$\(([^()]*)\)", line):
            yield from _commands(inner)
        lexer = shlex.shlex(re.sub(r"\"?\$\([^()]*\)\"?", "SUBSTITUTED", line), posix=True, punctuation_chars=True)
        lexer.commenters, lexer.whitespace_split = "#", True
        words: Words = []
        skip = False
        for word in lexer:
            if word in OPERATORS:
                yield words
                words = []
            elif word in REDIRECTIONS:
                skip = True
                if words and words[-1] in ("1", "2"):
                    words.pop()
            elif skip:
                skip = False
            else:
                words.append(word)
        yield words


def _check_files(words: Words) -> None:
    """Arguments that lie in a folder of this repository must exist there."""
    for word in words[1:]:
        for part in re.split(r"[=,]", word):
            if "/" in part and part.split("/")[0] in TOP_FOLDERS and "://" not in part:
                assert list(ROOT.glob(part.rstrip("/"))), f"`{shlex.join(words)}`: {part} does not exist"


@contextlib.contextmanager
def _refused(words: Words) -> Iterator[None]:
    """What argparse says before it exits becomes the AssertionError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit as stop:
        assert not stop.code, f"`{shlex.join(words)}`: {said.getvalue().strip().splitlines()[-1]}"


@cache
def server_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_cli_args_from_dataclass(parser, ClaaServerArgs)
    return parser


def _launch(words: Words) -> None:
    """`python -m sglang.launch_server` and `sglang serve`: SGLang's own flags with ours, and the values of ours."""
    with _refused(["sglang", *words]):
        args = server_parser().parse_args(words)
        values = {name: getattr(args, f"claa_{name}") for name in ClaaFlags.__struct_fields__}
        assert args.enable_claa or not any(values.values()), f"{words}: --claa flags without --enable-claa"
        resolve(ClaaFlags(**{**values, "profile": None}), LAYERS)


def _claa_sglang(words: Words) -> None:
    with _refused(["claa-sglang", *words]):
        cli._parser().parse_args(words)


class _Parsed(BaseException):
    """Raised in place of what a program does after it has read its arguments."""


def _program(words: Words, run: Callable[[], object]) -> None:
    """Run a program of ours up to its own parse_args, with these arguments; words[0] names it."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, args: object = None, namespace: object = None) -> None:
        parse(self, words[1:])
        raise _Parsed

    with _refused(words), contextlib.suppress(_Parsed):
        with mock.patch.object(sys, "argv", words), mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
            with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
                run()
        raise AssertionError(f"`{shlex.join(words)}`: it ran without reading arguments")


def _python(words: Words) -> None:
    match words:
        case ["-m", "sglang.launch_server", *rest]:
            _launch(rest)
        case ["-m", "pytest", *rest]:
            _pytest(rest)
        case ["-m", "pip", *rest]:
            _pip(rest)
        case ["-m", "venv" | "json.tool", *_]:
            pass
        case ["-m", module, *rest]:
            assert find_spec(module), f"`python -m {module}`: no such module"
            if rest:
                _program([module, *rest], lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
        case [script, *rest] if script.endswith(".py") or (ROOT / script / "__main__.py").is_file():
            assert (ROOT / script).exists(), f"`python {script}`: no such file"
            if rest:
                folder = str((ROOT / script).parent)  # of a folder, `runpy` puts itself there
                with mock.patch.object(sys, "path", [folder, *sys.path]):
                    _program([script, *rest], lambda: runpy.run_path(str(ROOT / script), run_name="__main__"))
        case _:
            raise AssertionError(
                f"`python {shlex.join(words)}`: give python a module (-m) or a file of this repository"
            )


def _sglang(words: Words) -> None:
    assert words and words[0] == "serve", f"`sglang {shlex.join(words)}`: only `sglang serve` is known here"
    _launch(words[1:])


def _make(words: Words) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        assert word in targets or "=" in word, f"`make {word}`: the Makefile has {', '.join(sorted(targets))}"


def _pip(words: Words) -> None:
    """Extras must be ours; a pin of a dependency must be the one we have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if extras := re.fullmatch(r"(?:\.|claa-sglang)\[(.*)\]", word):
            for extra in extras[1].split(","):
                assert extra in project["optional-dependencies"], f"`pip install {word}`: there is no extra {extra}"
        if word.startswith("sglang"):
            assert word in ("sglang", *project["dependencies"]), f"`pip install {word}`: {project['dependencies']}"


def _pytest(words: Words) -> None:
    """Files are looked at with all other arguments; a name after :: must be there."""
    for word in words:
        file, _, name = word.partition("::")
        if name:
            assert f"def {name.split('[')[0].rsplit('::', 1)[-1]}(" in (ROOT / file).read_text(), f"no test {word}"


def _curl(words: Words) -> None:
    """A body must be JSON. That a server understands it is for a python block to show."""
    for option, body in zip(words, words[1:], strict=False):
        if option in ("-d", "--data", "--data-raw", "--json") and not body.startswith("@"):
            json.loads(body)


def _eval(words: Words) -> None:
    assert words == ["SUBSTITUTED"], f'`eval {shlex.join(words)}`: only eval "$(command)" is known here'


def _script(words: Words) -> None:
    assert words and (ROOT / words[0]).is_file(), f"`bash {shlex.join(words)}`: no such file"


def _anything(words: Words) -> None:
    """Commands of the system, of which nothing here can be wrong but files, which are looked at for all."""


COMMANDS: dict[str, Callable[[Words], None]] = {
    "claa-sglang": _claa_sglang,
    "python": _python,
    "python3": _python,
    "sglang": _sglang,
    "make": _make,
    "pip": _pip,
    "pytest": _pytest,
    "curl": _curl,
    "eval": _eval,
    "bash": _script,
    **dict.fromkeys(("cd", "export", "source", "git", "jq", "cat", "ls", "diff", "ruff", "mypy"), _anything),
}
