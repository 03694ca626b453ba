"""What the documents show can be typed, and what they name is there. Client snippets run in engine tests."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from claa_sglang import cli
from claa_sglang.arguments import ClaaServerArgs
from tests import documents, shell_blocks
from tests.documents import DOCUMENTS, ROOT, Block

SHELL = ("bash", "sh", "shell", "console", "")  # a block without a tag is a shell block
# `text` is for what is only looked at: output, a diagram, a layout.
LANGUAGES = (*SHELL, "python", "json", "mermaid", "text")
DIAGRAMS = ("flowchart", "graph", "sequenceDiagram", "stateDiagram-v2", "classDiagram", "xychart-beta", "block-beta")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def each_block(*languages: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", documents.blocks(*languages), ids=lambda block: block.where)


@each_document
def test_every_block_says_what_it_is(path: Path) -> None:
    for block in documents.read(path).blocks:
        assert block.language in LANGUAGES, (
            f"{block.where}: a block of {block.language!r}, which no test understands. Tag it as one of "
            f"{', '.join(filter(None, LANGUAGES))} (text is never checked), or teach tests/fast/docs/test_documents.py"
        )
        assert block.text.strip(), f"{block.where}: an empty block"


@each_block(*SHELL)
def test_commands_are_what_their_parsers_take(block: Block) -> None:
    try:
        assert shell_blocks.check(block.text), "no command in it; tag it text"
    except (AssertionError, ValueError) as error:
        pytest.fail(f"{block.where}: {error}", pytrace=False)


@each_block("json")
def test_json_is_json(block: Block) -> None:
    try:
        json.loads(block.text)
    except ValueError as error:
        pytest.fail(f"{block.where}: {error}", pytrace=False)


@each_block("mermaid")
def test_diagrams_begin_with_their_kind(block: Block) -> None:
    assert block.text.split()[0] in DIAGRAMS, f"{block.where}: begins with none of {', '.join(DIAGRAMS)}"


@each_block("python")
def test_python_compiles_and_its_names_are_there(block: Block) -> None:
    """Imports of ours and of SGLang's resolve, and an Engine gets arguments that exist."""
    for node in ast.walk(ast.parse(block.text, block.where)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("claa_sglang", "sglang"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{block.where}: {node.module} has no {name.name}"
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "Engine":
            unknown = {word.arg for word in node.keywords} - {*ClaaServerArgs.__struct_fields__}
            assert not unknown, f"{block.where}: Engine takes no {', '.join(map(str, unknown))}"


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for where, target in documents.read(path).links():
        if re.match(r"[a-z]+:", target):
            continue  # another site: not asked from a test
        file, _, anchor = unquote(target).partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{where}: {target}: there is no {found}"
        if anchor and found.suffix == ".md":
            assert anchor in documents.read(found).anchors(), f"{where}: {target}: {found.name} has no such heading"


@each_document
def test_files_and_commands_in_the_text_are_there(path: Path) -> None:
    """Code spans that name something of ours: files, folders, tests, modules, commands and flags (see `missing`)."""
    wrong = [f"{where}: `{code}`: {what}" for where, code in documents.read(path).spans() if (what := missing(code))]
    if path.name == "CHANGELOG.md":
        wrong = []  # a history names what is gone
    assert not wrong, "\n".join(wrong)


FILES = {
    str(file.relative_to(ROOT))
    for top in ROOT.iterdir()
    if top.is_file() or (top.is_dir() and top.name in shell_blocks.TOP_FOLDERS)
    for file in ([top] if top.is_file() else top.rglob("*"))
}


def missing(code: str) -> str:
    """What is wrong with a code span; empty if nothing is, or if it names nothing that can be looked up."""
    words = code.split()
    match words:
        case ["claa-sglang", command, *_] if command[0].isalpha():
            return "" if command in subcommands() else f"claa-sglang has no {command}"
        case ["python", "-m", module, *_]:
            found = shell_blocks.find_spec(module) if "." in module or module in shell_blocks.TOP_FOLDERS else True
            return "" if found else f"there is no module {module}"
        case ["make", target] if target.islower():
            shell_blocks._make([target])
    for flag in re.findall(r"--(?:enable-claa|claa-[a-z-]+)", code):
        if not flag.endswith("-") and flag not in shell_blocks.server_parser()._option_string_actions:
            return f"the server has no {flag}"
    if test := re.fullmatch(r"(?P<file>test_\w+)::(?P<name>\w+)(?P<cut>…?)(?:\[.*\])?", code):
        files = [file for file in FILES if file.endswith(f"/{test['file']}.py")]
        begins = f"def {test['name']}" + ("" if test["cut"] else "(")
        return "" if any(begins in (ROOT / file).read_text() for file in files) else "there is no such test"
    if len(words) != 1 or not re.fullmatch(r"[\w./*{},-]+", code):
        return ""
    options = expanded(code.rstrip("/"))
    top = code.split("/")[0]
    if code.endswith(".py") or ("/" in code and top in shell_blocks.TOP_FOLDERS and "…" not in code):
        for option in options:
            pattern = re.compile(rf"(?:.*/)?{re.escape(option).replace(re.escape('*'), '[^/]*')}")
            if not any(pattern.fullmatch(file) for file in FILES):
                return f"there is no {option} in this repository"
    return ""


def expanded(text: str) -> list[str]:
    """`a/{b,c}.py` as its two names."""
    if not (braces := re.search(r"\{([^{}]*)\}", text)):
        return [text]
    return [name for part in braces[1].split(",") for name in expanded(text.replace(braces[0], part, 1))]


def subcommands() -> set[str]:
    (action,) = [action for action in cli._parser()._actions if isinstance(action.choices, dict)]
    return set(action.choices or ())


# --- that the reading itself sees what it must


WRONG = {
    "```bash\nmake nothing\n```": "make nothing",
    "```bash\nclaa-sglang calibrate --modle M --out p.json\n```": "required: --model",
    "```bash\nclaa-sglang calibrate --model M --out p.json --fast\n```": "unrecognized arguments: --fast",
    "```bash\npython -m sglang.launch_server --model-path M --enable-claa --claa-keep 0.2 --claa-nothing\n```": "claa",
    "```bash\npython -m sglang.launch_server --model-path M --enable-claa --claa-keep-rate 2\n```": "at most 1",
    "```bash\nsglang serve --model-path M --claa-keep-rate 0.2\n```": "without --enable-claa",
    "```bash\npython -m benchmarks.eval_quality_plot a.json --no-such\n```": "unrecognized arguments: --no-such",
    "```bash\npython -m benchmarks.nothing\n```": "no such module",
    "```bash\npython examples/demo --repeats many\n```": "invalid int value",
    "```bash\npython -m benchmarks.eval_quality_plot benchmarks/results/nothing.json\n```": "does not exist",
    "```bash\npip install '.[everything]'\n```": "no extra everything",
    "```bash\npip install sglang==0.4\n```": "sglang==0.4",
    "```bash\nfrobnicate --all\n```": "no command known",
    "```bash\nX=1 make demo && make \\\n  nothing | cat > file\n```": "make nothing",
    '```bash\neval "$(claa-sglang gpu-env)"\n```': "invalid choice: 'gpu-env'",
    "```bash\ncurl http://localhost:1 -d '{\"a\": }'\n```": "Expecting value",
}


@pytest.mark.parametrize(("text", "says"), WRONG.items(), ids=[text.split("\n")[1][:40] for text in WRONG])
def test_a_wrong_command_is_seen(text: str, says: str) -> None:
    with pytest.raises((AssertionError, ValueError), match=re.escape(says)):
        shell_blocks.check(text.split("\n", 1)[1].rsplit("\n", 1)[0])


def test_commands_are_told_from_what_is_around_them() -> None:
    text = "MODEL=org/m\nexport A=b  # why\n$ make demo  # comment\npip install . && FOO=1 make test > log 2>&1\n"
    assert shell_blocks.check(text + "claa-sglang calibrate --model $MODEL \\\n    --out p.json\n") == 5


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("examples/demo/prose.py", False), ("prose.py", False), ("examples/nothing.py", True), ("nothing.py", True),
        ("tests/fast/", False), ("tests/slow/", True), ("benchmarks/results/quality_*_h200.json", False),
        ("claa-sglang calibrate --model M", False), ("claa-sglang guess", True), ("python -m benchmarks.none", True),
        ("--claa-policy auto", False), ("--claa-police auto", True), ("/server_info", False), ("a/b", False),
        ("test_documents::test_a_wrong_name_is_seen", False), ("test_documents::test_a_wrong_name", True),
        ("test_documents::test_a_wrong_name…", False), ("test_nothing::test_a…", True),
        ("examples/demo/{asking,prose}.py", False), ("examples/demo/{asking,none}.py", True), ("profile.json", False),
    ],
)  # fmt: skip
def test_a_wrong_name_is_seen(code: str, wrong: bool) -> None:
    assert bool(missing(code)) is wrong


def test_blocks_links_and_anchors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (path := tmp_path / "a.md").write_text(
        "# One `two`: three_four!\n## Same\n## Same\n- item\n  ```bash gpu\n  make x\n    y\n  ```\n"
        '[a [b]](c.md#d) ![i](i.png "t") `[no](no.md)` <img src="j.png">\n~~~\n[no](no.md)\n~~~\n'
    )
    read = documents.read(path)
    assert [(b.where, b.language, b.text) for b in read.blocks] == [
        ("a.md:5", "bash", "make x\n  y"),
        ("a.md:10", "", "[no](no.md)"),
    ]
    assert [target for _, target in read.links()] == ["c.md#d", "i.png", "j.png"]
    assert read.anchors() == {"one-two-three_four", "same", "same-1"}
    path.with_name("open.md").write_text("```\nnever closed\n")
    with pytest.raises(AssertionError, match="never closed"):
        documents.read(path.with_name("open.md"))
